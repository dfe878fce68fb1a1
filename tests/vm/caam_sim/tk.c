// SPDX-License-Identifier: GPL-2.0
/*
 * tk(cbc(aes)) and tk(ecb(aes)): ciphers that take a tagged black key in place of the key itself.
 *
 * setkey uncovers the black key; data then goes through the kernel's own synchronous cipher, so
 * what is written is what cbc(aes) with the plain key would have written.
 *
 * The hardware uncovers a black key for every job. Here that is done once, and again for every key
 * in use when the JDKEK is renewed: each then is what the new JDKEK makes of it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <crypto/aes.h>
#include <crypto/internal/skcipher.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/string.h>

#include "caam_sim.h"

static LIST_HEAD(in_use);
static DEFINE_MUTEX(in_use_turn);

struct tk_ctx {
	struct crypto_skcipher *child;
	struct list_head in_use;
	struct tag_header tag;
	u8 black[BLACK_KEY_MAX_BYTES];
	bool has_key;
	/* A CCM black key of an earlier session: the hardware notices when it uses the key. */
	bool key_refused;
};

static int tk_init(struct crypto_skcipher *tfm, const char *child_name)
{
	struct tk_ctx *ctx = crypto_skcipher_ctx(tfm);

	/* dm-crypt passes over ciphers that allocate memory per request; a synchronous child in
	 * the request's own context needs none. */
	ctx->child = crypto_alloc_skcipher(child_name, 0, CRYPTO_ALG_ASYNC);
	if (IS_ERR(ctx->child))
		return PTR_ERR(ctx->child);
	crypto_skcipher_set_reqsize(tfm, sizeof(struct skcipher_request) +
						 crypto_skcipher_reqsize(ctx->child));
	mutex_lock(&in_use_turn);
	list_add(&ctx->in_use, &in_use);
	mutex_unlock(&in_use_turn);
	return 0;
}

static int tk_cbc_init(struct crypto_skcipher *tfm)
{
	return tk_init(tfm, "cbc(aes)");
}

static int tk_ecb_init(struct crypto_skcipher *tfm)
{
	return tk_init(tfm, "ecb(aes)");
}

static void tk_exit(struct crypto_skcipher *tfm)
{
	struct tk_ctx *ctx = crypto_skcipher_ctx(tfm);

	mutex_lock(&in_use_turn);
	list_del(&ctx->in_use);
	mutex_unlock(&in_use_turn);
	crypto_free_skcipher(ctx->child);
}

static bool is_aes_key(u32 len)
{
	return len == AES_KEYSIZE_128 || len == AES_KEYSIZE_192 || len == AES_KEYSIZE_256;
}

static int uncover_into_child(struct tk_ctx *ctx)
{
	u8 red[KEY_MAX_BYTES];
	int err = uncover_key(ctx->tag.type, ctx->black, red, ctx->tag.red_key_len);

	ctx->key_refused = err == -EBADMSG;
	if (!err)
		err = crypto_skcipher_setkey(ctx->child, red, ctx->tag.red_key_len);
	memzero_explicit(red, sizeof(red));
	return ctx->key_refused ? 0 : err;
}

static int tk_setkey(struct crypto_skcipher *tfm, const u8 *key, unsigned int len)
{
	struct tk_ctx *ctx = crypto_skcipher_ctx(tfm);
	struct tag_header tag;
	int err;

	if (len < sizeof(tag))
		return -EINVAL;
	memcpy(&tag, key, sizeof(tag));
	if (check_tag(&tag) || !is_aes_key(tag.red_key_len) ||
	    tag.obj_len != black_key_bytes(tag.type, tag.red_key_len) ||
	    len != sizeof(tag) + tag.obj_len)
		return -EINVAL;

	mutex_lock(&in_use_turn);
	ctx->tag = tag;
	memcpy(ctx->black, key + sizeof(tag), tag.obj_len);
	err = uncover_into_child(ctx);
	ctx->has_key = !err;
	mutex_unlock(&in_use_turn);
	return err;
}

int tk_renew(void)
{
	struct tk_ctx *ctx;
	int err = 0;

	mutex_lock(&in_use_turn);
	renew_jdkek();
	list_for_each_entry(ctx, &in_use, in_use)
		if (ctx->has_key && !err)
			err = uncover_into_child(ctx);
	mutex_unlock(&in_use_turn);
	return err;
}

static int tk_crypt(struct skcipher_request *req, int (*crypt)(struct skcipher_request *))
{
	struct tk_ctx *ctx = crypto_skcipher_ctx(crypto_skcipher_reqtfm(req));
	struct skcipher_request *child = skcipher_request_ctx(req);

	if (ctx->key_refused) {
		pr_err_ratelimited("job failed: ICV\n");
		return -EIO;
	}
	skcipher_request_set_tfm(child, ctx->child);
	skcipher_request_set_callback(child, req->base.flags, NULL, NULL);
	skcipher_request_set_crypt(child, req->src, req->dst, req->cryptlen, req->iv);
	return crypt(child);
}

static int tk_encrypt(struct skcipher_request *req)
{
	return tk_crypt(req, crypto_skcipher_encrypt);
}

static int tk_decrypt(struct skcipher_request *req)
{
	return tk_crypt(req, crypto_skcipher_decrypt);
}

#define TK_ALG(mode, iv_bytes)							\
	{									\
		.base = {							\
			.cra_name = "tk(" #mode "(aes))",			\
			.cra_driver_name = "tk-" #mode "-aes-caam",		\
			.cra_priority = 3000,					\
			.cra_blocksize = AES_BLOCK_SIZE,			\
			.cra_ctxsize = sizeof(struct tk_ctx),			\
			.cra_module = THIS_MODULE,				\
		},								\
		.init = tk_##mode##_init,					\
		.exit = tk_exit,						\
		.setkey = tk_setkey,						\
		.encrypt = tk_encrypt,						\
		.decrypt = tk_decrypt,						\
		.min_keysize = sizeof(struct tag_header) + KEY_MIN_BYTES,	\
		.max_keysize = TAGGED_KEY_MAX_BYTES,				\
		.ivsize = iv_bytes,						\
	}

static struct skcipher_alg tk_algs[] = {
	TK_ALG(cbc, AES_BLOCK_SIZE),
	TK_ALG(ecb, 0),
};

int tk_register(void)
{
	return crypto_register_skciphers(tk_algs, ARRAY_SIZE(tk_algs));
}

void tk_unregister(void)
{
	crypto_unregister_skciphers(tk_algs, ARRAY_SIZE(tk_algs));
}
