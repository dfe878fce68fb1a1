// SPDX-License-Identifier: GPL-2.0
/*
 * Covering keys for RAM (black keys) and sealing them for storage (blobs).
 *
 * A black key is covered by the JDKEK, random at every load of the module as it is at every cold
 * boot of the hardware, and whenever a test renews it. A blob is sealed by a random blob key, itself wrapped by a key derived
 * from the OTPMK: two OTPMKs are two chips.
 *
 *   blob: 32 bytes wrapped blob key | key padded to 8 + 12 bytes | 16 bytes MAC
 */
#include <crypto/aead.h>
#include <crypto/aes.h>
#include <crypto/sha2.h>
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "caam_sim.h"

#define CCM_IV_BYTES 16
#define CCM_AAD_BYTES 8

static u8 otpmk[OTPMK_BYTES];
static u8 jdkek[AES_KEYSIZE_256];

/* One transform for every seal: its key changes with each use, so uses take turns. */
static struct crypto_aead *ccm;
static DEFINE_MUTEX(ccm_turn);

int seal_init(const u8 chip_key[OTPMK_BYTES])
{
	ccm = crypto_alloc_aead("ccm(aes)", 0, CRYPTO_ALG_ASYNC);
	if (IS_ERR(ccm))
		return PTR_ERR(ccm);
	memcpy(otpmk, chip_key, sizeof(otpmk));
	renew_jdkek();
	return 0;
}

void renew_jdkek(void)
{
	get_random_bytes(jdkek, sizeof(jdkek));
}

void seal_exit(void)
{
	crypto_free_aead(ccm);
	memzero_explicit(otpmk, sizeof(otpmk));
	memzero_explicit(jdkek, sizeof(jdkek));
}

u32 black_key_bytes(u32 type, u32 red_len)
{
	return type & TAG_TYPE_CCM ? roundup(red_len, 8) + CCM_OVERHEAD : roundup(red_len, 16);
}

static u32 sealed_bytes(u32 red_len)
{
	return roundup(red_len, 8) + CCM_OVERHEAD;
}

u32 blob_bytes(u32 red_len)
{
	return sealed_bytes(red_len) + BLOB_OVERHEAD;
}

int check_tag(const struct tag_header *tag)
{
	if (tag->magic != TAG_MAGIC || tag->version != TAG_VERSION)
		return -EINVAL;
	if (tag->type != TAG_TYPE_ECB_KEY && tag->type != TAG_TYPE_CCM_KEY)
		return -EINVAL;
	if (tag->red_key_len < KEY_MIN_BYTES || tag->red_key_len > KEY_MAX_BYTES)
		return -EINVAL;
	return 0;
}

/* AES-ECB of whole blocks; expanding a key fails for no other reason than its length. */
static void ecb(const u8 key[AES_KEYSIZE_256], const u8 *from, u8 *to, u32 len, bool encrypt)
{
	struct crypto_aes_ctx schedule;
	u32 at;

	aes_expandkey(&schedule, key, AES_KEYSIZE_256);
	for (at = 0; at < len; at += AES_BLOCK_SIZE) {
		if (encrypt)
			aes_encrypt(&schedule, to + at, from + at);
		else
			aes_decrypt(&schedule, to + at, from + at);
	}
	memzero_explicit(&schedule, sizeof(schedule));
}

/*
 * AES-CCM in place over `object`: len bytes and, behind them, mac_len bytes of MAC.
 * The buffers of a scatterlist may not lie on the stack (CONFIG_VMAP_STACK).
 */
static int ccm_crypt(const u8 key[AES_KEYSIZE_256], const u8 *nonce, u32 nonce_len,
		     const u32 aad[CCM_AAD_BYTES / sizeof(u32)], u8 *object, u32 len, u32 mac_len,
		     bool encrypt)
{
	u32 room = CCM_IV_BYTES + CCM_AAD_BYTES + len + mac_len;
	struct aead_request *req = NULL;
	struct scatterlist sg;
	u8 *buf, *iv, *text;
	int err;

	buf = kzalloc(room, GFP_KERNEL);
	if (!buf)
		return -ENOMEM;
	iv = buf;
	text = buf + CCM_IV_BYTES + CCM_AAD_BYTES;
	iv[0] = 1; /* RFC 3610: a length field of two bytes, hence a nonce of 13 */
	memcpy(iv + 1, nonce, nonce_len);
	memcpy(buf + CCM_IV_BYTES, aad, CCM_AAD_BYTES);
	memcpy(text, object, encrypt ? len : len + mac_len);
	sg_init_one(&sg, buf + CCM_IV_BYTES, room - CCM_IV_BYTES);

	mutex_lock(&ccm_turn);
	err = crypto_aead_setkey(ccm, key, AES_KEYSIZE_256);
	if (!err)
		err = crypto_aead_setauthsize(ccm, mac_len);
	if (!err) {
		req = aead_request_alloc(ccm, GFP_KERNEL);
		err = req ? 0 : -ENOMEM;
	}
	if (!err) {
		aead_request_set_callback(req, 0, NULL, NULL);
		aead_request_set_ad(req, CCM_AAD_BYTES);
		aead_request_set_crypt(req, &sg, &sg, encrypt ? len : len + mac_len, iv);
		err = encrypt ? crypto_aead_encrypt(req) : crypto_aead_decrypt(req);
	}
	mutex_unlock(&ccm_turn);

	if (!err)
		memcpy(object, text, encrypt ? len + mac_len : len);
	if (req)
		aead_request_free(req);
	kfree_sensitive(buf);
	return err;
}

int cover_key(u32 type, const u8 *red, u32 red_len, u8 *black)
{
	u8 padded[KEY_MAX_BYTES] = {};
	const u32 aad[] = { type, red_len };
	int err = 0;

	memcpy(padded, red, red_len);
	if (type & TAG_TYPE_CCM) {
		u8 *nonce = black + roundup(red_len, 8) + CCM_MAC_BYTES;

		get_random_bytes(nonce, CCM_NONCE_BYTES);
		memcpy(black, padded, roundup(red_len, 8));
		err = ccm_crypt(jdkek, nonce, CCM_NONCE_BYTES, aad, black, roundup(red_len, 8),
				CCM_MAC_BYTES, true);
	} else {
		ecb(jdkek, padded, black, roundup(red_len, 16), true);
	}
	memzero_explicit(padded, sizeof(padded));
	return err;
}

/* An ECB covering has no MAC: a key of an earlier boot uncovers to another key, silently. */
int uncover_key(u32 type, const u8 *black, u8 *red, u32 red_len)
{
	u8 work[BLACK_KEY_MAX_BYTES];
	const u32 aad[] = { type, red_len };
	int err = 0;

	if (type & TAG_TYPE_CCM) {
		memcpy(work, black, black_key_bytes(type, red_len));
		err = ccm_crypt(jdkek, black + roundup(red_len, 8) + CCM_MAC_BYTES,
				CCM_NONCE_BYTES, aad, work, roundup(red_len, 8), CCM_MAC_BYTES,
				false);
	} else {
		ecb(jdkek, black, work, roundup(red_len, 16), false);
	}
	if (!err)
		memcpy(red, work, red_len);
	memzero_explicit(work, sizeof(work));
	return err;
}

/* The hardware derives a blob key encryption key from the OTPMK, the key modifier and the kind. */
static void derive_kek(const u8 modifier[KEY_MODIFIER_BYTES], u32 type, u8 kek[AES_KEYSIZE_256])
{
	u8 input[OTPMK_BYTES + KEY_MODIFIER_BYTES + sizeof(type)];

	memcpy(input, otpmk, OTPMK_BYTES);
	memcpy(input + OTPMK_BYTES, modifier, KEY_MODIFIER_BYTES);
	memcpy(input + OTPMK_BYTES + KEY_MODIFIER_BYTES, &type, sizeof(type));
	sha256(input, sizeof(input), kek);
	memzero_explicit(input, sizeof(input));
}

/* In place: `sealed` has `len` bytes, and behind them room for the MAC. */
static int seal(const u8 *modifier, u32 type, const u32 aad[2], u8 *wrapped, u8 *sealed, u32 len)
{
	u8 kek[AES_KEYSIZE_256], blob_key[BLOB_KEY_BYTES];
	int err;

	get_random_bytes(blob_key, sizeof(blob_key));
	derive_kek(modifier, type, kek);
	ecb(kek, blob_key, wrapped, BLOB_KEY_BYTES, true);
	err = ccm_crypt(blob_key, NULL, 0, aad, sealed, len, BLOB_MAC_BYTES, true);
	memzero_explicit(blob_key, sizeof(blob_key));
	memzero_explicit(kek, sizeof(kek));
	return err;
}

/* The inverse. */
static int open(const u8 *modifier, u32 type, const u32 aad[2], const u8 *wrapped, u8 *sealed,
		u32 len)
{
	u8 kek[AES_KEYSIZE_256], blob_key[BLOB_KEY_BYTES];
	int err;

	derive_kek(modifier, type, kek);
	ecb(kek, wrapped, blob_key, BLOB_KEY_BYTES, false);
	err = ccm_crypt(blob_key, NULL, 0, aad, sealed, len, BLOB_MAC_BYTES, false);
	memzero_explicit(blob_key, sizeof(blob_key));
	memzero_explicit(kek, sizeof(kek));
	return err;
}

static const u8 no_modifier[KEY_MODIFIER_BYTES];

int seal_blob(u32 type, const u8 *red, u32 red_len, u8 *blob)
{
	const u32 aad[] = { type, red_len };
	u8 *sealed = blob + BLOB_KEY_BYTES;

	memset(sealed, 0, sealed_bytes(red_len));
	memcpy(sealed, red, red_len);
	return seal(no_modifier, type, aad, blob, sealed, sealed_bytes(red_len));
}

int open_blob(u32 type, const u8 *blob, u8 *red, u32 red_len)
{
	u8 sealed[BLOB_MAX_BYTES];
	const u32 aad[] = { type, red_len };
	int err;

	memcpy(sealed, blob + BLOB_KEY_BYTES, sealed_bytes(red_len) + BLOB_MAC_BYTES);
	err = open(no_modifier, type, aad, blob, sealed, sealed_bytes(red_len));
	if (!err)
		memcpy(red, sealed, red_len);
	memzero_explicit(sealed, sizeof(sealed));
	return err;
}

/* The blob of memory is as long as what it holds and BLOB_OVERHEAD; it does not say its length. */
int seal_memory(const u8 modifier[KEY_MODIFIER_BYTES], const u8 *red, u32 len, u8 *blob)
{
	const u32 aad[] = { TAG_TYPE_MEMORY, len };

	memcpy(blob + BLOB_KEY_BYTES, red, len);
	return seal(modifier, TAG_TYPE_MEMORY, aad, blob, blob + BLOB_KEY_BYTES, len);
}

int open_memory(const u8 modifier[KEY_MODIFIER_BYTES], const u8 *blob, u8 *red, u32 len)
{
	const u32 aad[] = { TAG_TYPE_MEMORY, len };
	u8 sealed[MEMORY_MAX_BYTES + BLOB_MAC_BYTES];
	int err;

	memcpy(sealed, blob + BLOB_KEY_BYTES, len + BLOB_MAC_BYTES);
	err = open(modifier, TAG_TYPE_MEMORY, aad, blob, sealed, len);
	if (!err)
		memcpy(red, sealed, len);
	memzero_explicit(sealed, sizeof(sealed));
	return err;
}
