// SPDX-License-Identifier: GPL-2.0
/* The simulated CAAM: /dev/caam-keygen with the ABI and the errors of NXP's kernels. */
#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "caam_sim.h"

static char *otpmk = "";
module_param(otpmk, charp, 0400);
MODULE_PARM_DESC(otpmk, "The chip's master key: 64 hex digits");

static bool secure = true;
module_param(secure, bool, 0400);
MODULE_PARM_DESC(secure, "A closed part; an open one seals under a key that all chips share");

/* A request's texts and objects, copied in, so that nothing is read twice from user space. */
struct keygen_job {
	struct keygen_cmd cmd;
	char enc[8];
	char mode[8];
	u8 red[KEY_MAX_BYTES];
	u32 red_len;
	u32 type;
	u8 tagged_key[TAGGED_KEY_MAX_BYTES];
	u8 tagged_blob[TAGGED_BLOB_MAX_BYTES];
	const char *complaint;
};

static int copy_text(char *to, size_t room, u64 from, u32 len)
{
	if (!len || !from)
		return -EFAULT;
	if (len > room)
		return -EINVAL;
	if (copy_from_user(to, u64_to_user_ptr(from), len))
		return -EFAULT;
	to[len - 1] = '\0';
	return 0;
}

static int read_encapsulation(struct keygen_job *job)
{
	int err = copy_text(job->enc, sizeof(job->enc), job->cmd.key_enc, job->cmd.key_enc_len);

	if (err == -EFAULT)
		return err;
	if (!err && !strcmp(job->enc, "ecb"))
		job->type = TAG_TYPE_ECB_KEY;
	else if (!err && !strcmp(job->enc, "ccm"))
		job->type = TAG_TYPE_CCM_KEY;
	else
		err = -EINVAL;
	if (err)
		job->complaint = "Unsupported key encryption: expected ecb or ccm";
	return err;
}

static int random_key(struct keygen_job *job, const char *size)
{
	if (kstrtou32(size, 10, &job->red_len) || job->red_len < KEY_MIN_BYTES ||
	    job->red_len > KEY_MAX_BYTES) {
		job->complaint = "Invalid key size: expected 16 to 64 bytes";
		return -EINVAL;
	}
	get_random_bytes(job->red, job->red_len);
	return 0;
}

static int given_key(struct keygen_job *job, const char *key, u32 len)
{
	if (len < KEY_MIN_BYTES || len > KEY_MAX_BYTES) {
		job->complaint = "Invalid key length: expected 16 to 64 bytes";
		return -EINVAL;
	}
	memcpy(job->red, key, len);
	job->red_len = len;
	return 0;
}

static int read_key(struct keygen_job *job)
{
	char value[KEY_MAX_BYTES + 1] = {};
	u32 len = job->cmd.key_value_len;
	int err;

	err = copy_text(job->mode, sizeof(job->mode), job->cmd.key_mode, job->cmd.key_mode_len);
	if (err == -EFAULT)
		return err;
	if (!len || !job->cmd.key_value)
		return -EFAULT;
	if (copy_from_user(value, u64_to_user_ptr(job->cmd.key_value), min_t(u32, len, KEY_MAX_BYTES)))
		return -EFAULT;
	if (!err && !strcmp(job->mode, "-s"))
		err = random_key(job, value);
	else if (!err && !strcmp(job->mode, "-t"))
		err = given_key(job, value, len);
	else {
		job->complaint = "Unsupported key mode: expected -s or -t";
		err = -EINVAL;
	}
	memzero_explicit(value, sizeof(value));
	return err;
}

static void write_tag(u8 *to, const struct keygen_job *job, u32 obj_len)
{
	const struct tag_header tag = {
		.magic = TAG_MAGIC,
		.version = TAG_VERSION,
		.type = job->type,
		.red_key_len = job->red_len,
		.obj_len = obj_len,
	};

	memcpy(to, &tag, sizeof(tag));
}

/* The needed length is written back whether or not the room was enough. */
static int hand_out(u64 to, u32 *room, const u8 *object, u32 len)
{
	bool fits = *room >= len;

	*room = len;
	if (!fits)
		return -EINVAL;
	if (!to || copy_to_user(u64_to_user_ptr(to), object, len))
		return -EFAULT;
	return 0;
}

static int hand_out_key(struct keygen_job *job)
{
	u32 len = black_key_bytes(job->type, job->red_len);
	int err;

	write_tag(job->tagged_key, job, len);
	err = cover_key(job->type, job->red, job->red_len,
			job->tagged_key + sizeof(struct tag_header));
	if (err)
		return err;
	return hand_out(job->cmd.black_key, &job->cmd.black_key_len, job->tagged_key,
			sizeof(struct tag_header) + len);
}

static int hand_out_blob(struct keygen_job *job)
{
	u32 len = blob_bytes(job->red_len);
	int err;

	write_tag(job->tagged_blob, job, len);
	err = seal_blob(job->type, job->red, job->red_len,
			job->tagged_blob + sizeof(struct tag_header));
	if (err)
		return err;
	return hand_out(job->cmd.blob, &job->cmd.blob_len, job->tagged_blob,
			sizeof(struct tag_header) + len);
}

static int keygen_create(struct keygen_job *job)
{
	u32 room = job->cmd.blob_len;
	int err;

	err = read_encapsulation(job);
	if (!err)
		err = read_key(job);
	if (!err)
		err = hand_out_key(job);
	if (!err)
		err = hand_out_blob(job);
	if (job->complaint && job->cmd.blob) {
		u32 len = min_t(u32, room, strlen(job->complaint) + 1);

		if (copy_to_user(u64_to_user_ptr(job->cmd.blob), job->complaint, len))
			err = -EFAULT;
	}
	return err;
}

static int keygen_import(struct keygen_job *job)
{
	u32 len = job->cmd.blob_len;
	struct tag_header tag;
	int err;

	if (!len || !job->cmd.blob || !job->cmd.black_key || !job->cmd.black_key_len)
		return -EFAULT;
	if (len < sizeof(tag) || len > sizeof(job->tagged_blob))
		return -EINVAL;
	if (copy_from_user(job->tagged_blob, u64_to_user_ptr(job->cmd.blob), len))
		return -EFAULT;
	memcpy(&tag, job->tagged_blob, sizeof(tag));
	if (check_tag(&tag) || tag.obj_len != blob_bytes(tag.red_key_len) ||
	    len != sizeof(tag) + tag.obj_len) {
		pr_err("caam_sim: not a tagged blob\n");
		return -EINVAL;
	}
	job->type = tag.type;
	job->red_len = tag.red_key_len;
	err = open_blob(job->type, job->tagged_blob + sizeof(tag), job->red, job->red_len);
	if (err) {
		pr_err("caam_sim: blob refused: MAC check failed (%d)\n", err);
		return err;
	}
	return hand_out_key(job);
}

static long keygen_ioctl(struct file *file, unsigned int request, unsigned long arg)
{
	struct keygen_job *job;
	long err;

	if (request != KEYGEN_IOCTL_CREATE && request != KEYGEN_IOCTL_IMPORT)
		return -ENOTTY;
	job = kzalloc(sizeof(*job), GFP_KERNEL);
	if (!job)
		return -ENOMEM;
	if (copy_from_user(&job->cmd, (void __user *)arg, sizeof(job->cmd))) {
		err = -EFAULT;
		goto out;
	}
	err = request == KEYGEN_IOCTL_CREATE ? keygen_create(job) : keygen_import(job);
	if (copy_to_user((void __user *)arg, &job->cmd, sizeof(job->cmd)))
		err = -EFAULT;
out:
	kfree_sensitive(job);
	return err;
}

static const struct file_operations keygen_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = keygen_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice keygen_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = KEYGEN_DEVICE,
	.fops = &keygen_fops,
	.mode = 0600,
};

static int chip_key(u8 key[OTPMK_BYTES])
{
	memset(key, 0, OTPMK_BYTES);
	if (!secure)
		return 0;
	if (strlen(otpmk) != 2 * OTPMK_BYTES || hex2bin(key, otpmk, OTPMK_BYTES)) {
		pr_err("caam_sim: otpmk must have 64 hex digits\n");
		return -EINVAL;
	}
	return 0;
}

static int __init caam_sim_init(void)
{
	u8 key[OTPMK_BYTES];
	int err;

	BUILD_BUG_ON(sizeof(struct keygen_cmd) != 56);
	err = chip_key(key);
	if (!err)
		err = seal_init(key);
	memzero_explicit(key, sizeof(key));
	if (err)
		return err;
	err = tk_register();
	if (err)
		goto no_tk;
	err = misc_register(&keygen_device);
	if (err)
		goto no_device;
	return 0;

no_device:
	tk_unregister();
no_tk:
	seal_exit();
	return err;
}

static void __exit caam_sim_exit(void)
{
	misc_deregister(&keygen_device);
	tk_unregister();
	seal_exit();
}

module_init(caam_sim_init);
module_exit(caam_sim_exit);

MODULE_DESCRIPTION("Simulated CAAM: black keys, black blobs and tagged-key ciphers for tests");
MODULE_LICENSE("GPL");
MODULE_SOFTDEP("pre: ccm ctr ecb cbc aes");
