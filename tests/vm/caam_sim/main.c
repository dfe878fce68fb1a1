// SPDX-License-Identifier: GPL-2.0
/* The simulated CAAM: /dev/caam-keygen with the ABI and the errors of NXP's kernels. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/pm.h>
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

static bool keygen = true;
module_param(keygen, bool, 0400);
MODULE_PARM_DESC(keygen, "NXP's driver and ciphers; mainline has neither");

static bool present = true;
module_param(present, bool, 0400);
MODULE_PARM_DESC(present, "Whether there is a CAAM; the drivers of others' keys need this module");

static bool loses_power_in_sleep;

/* "now", or "resume": the CAAM's power is cut in the next sleep, between its suspend and its resume. */
static int begin_session(const char *val, const struct kernel_param *kp)
{
	if (!present || !keygen)
		return -ENODEV;
	if (!sysfs_streq(val, "resume"))
		return tk_renew();
	loses_power_in_sleep = true;
	return 0;
}

static int caam_resume(struct device *dev)
{
	bool lost = loses_power_in_sleep;

	loses_power_in_sleep = false;
	return lost ? tk_renew() : 0;
}

static DEFINE_SIMPLE_DEV_PM_OPS(caam_pm, NULL, caam_resume);
static struct platform_driver caam_driver = {
	.driver = { .name = KBUILD_MODNAME, .pm = pm_sleep_ptr(&caam_pm) },
};
static struct platform_device *caam_device;

static int power_register(void)
{
	int err = platform_driver_register(&caam_driver);

	if (err)
		return err;
	caam_device = platform_device_register_simple(KBUILD_MODNAME, PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(caam_device)) {
		platform_driver_unregister(&caam_driver);
		return PTR_ERR(caam_device);
	}
	return 0;
}

static void power_unregister(void)
{
	platform_device_unregister(caam_device);
	platform_driver_unregister(&caam_driver);
}

static const struct kernel_param_ops new_session_ops = { .set = begin_session };
module_param_cb(new_session, &new_session_ops, NULL, 0200);
MODULE_PARM_DESC(new_session, "Write now or resume: a new JDKEK, also for the keys in use");

bool caam_present(void)
{
	return present;
}

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
};

/*
 * Cuts the text to its room and always ends it with a NUL. A text that cannot be delivered does
 * not change the error it explains.
 */
static int complain(int err, u64 to, u32 room, const char *text)
{
	char line[80];

	if (room > 1) {
		strscpy(line, text, min_t(size_t, room, sizeof(line)));
		if (copy_to_user(u64_to_user_ptr(to), line, strlen(line) + 1))
			pr_debug("nowhere to put: %s\n", text);
	}
	return err;
}

/* Most texts go where the blob would: into the blob buffer of the request. */
static int complain_in_blob(const struct keygen_job *job, int err, const char *text)
{
	return complain(err, job->cmd.blob, job->cmd.blob_len, text);
}

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
		return complain_in_blob(job, err, "Cannot read the key encryption type.\n");
	if (!err && !strcmp(job->enc, "ecb"))
		job->type = TAG_TYPE_ECB_KEY;
	else if (!err && !strcmp(job->enc, "ccm"))
		job->type = TAG_TYPE_CCM_KEY;
	else
		return complain_in_blob(job, -EINVAL,
					"Invalid key encryption type: expected ecb or ccm.\n");
	return 0;
}

static int accept_size(struct keygen_job *job, u32 len)
{
	if (len < KEY_MIN_BYTES || len > KEY_MAX_BYTES)
		return complain_in_blob(job, -EINVAL,
					"Invalid key size: expected 16 to 64 bytes.\n");
	job->red_len = len;
	return 0;
}

static int random_key(struct keygen_job *job, const char *size)
{
	u32 len;
	int err;

	if (kstrtou32(size, 10, &len))
		return complain_in_blob(job, -EINVAL, "Invalid key size: expected a number.\n");
	err = accept_size(job, len);
	if (!err)
		get_random_bytes(job->red, job->red_len);
	return err;
}

/* A key given as text ends at its first NUL: the driver takes its length with strlen(). */
static int given_key(struct keygen_job *job, const char *key)
{
	int err = accept_size(job, strlen(key));

	if (!err)
		memcpy(job->red, key, job->red_len);
	return err;
}

static int read_key(struct keygen_job *job)
{
	/* One byte more than the longest key, so that a longer one is seen as such, and a NUL. */
	char value[KEY_MAX_BYTES + 2] = {};
	u32 len = min_t(u32, job->cmd.key_value_len, KEY_MAX_BYTES + 1);
	int err;

	err = copy_text(job->mode, sizeof(job->mode), job->cmd.key_mode, job->cmd.key_mode_len);
	if (err == -EFAULT)
		return complain_in_blob(job, err, "Cannot read the key mode.\n");
	if (err || (strcmp(job->mode, "-s") && strcmp(job->mode, "-t")))
		return complain_in_blob(job, -EINVAL, "Invalid key mode: expected -s or -t.\n");
	if (!len || !job->cmd.key_value ||
	    copy_from_user(value, u64_to_user_ptr(job->cmd.key_value), len))
		err = complain_in_blob(job, -EFAULT, "Cannot read the key value.\n");
	else if (!strcmp(job->mode, "-s"))
		err = random_key(job, value);
	else
		err = given_key(job, value);
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

static int hand_out(u64 to, const u8 *object, u32 len)
{
	if (!to || copy_to_user(u64_to_user_ptr(to), object, len))
		return -EFAULT;
	return 0;
}

/* The needed length is written back whether or not the room was enough. */
static int hand_out_key(struct keygen_job *job)
{
	u32 black_len = black_key_bytes(job->type, job->red_len);
	u32 len = sizeof(struct tag_header) + black_len;
	bool fits = job->cmd.black_key_len >= len;
	int err;

	job->cmd.black_key_len = len;
	if (!fits)
		/* Into the blob buffer in an import as well: the caller's blob is gone then. */
		return complain_in_blob(job, -EINVAL, "Not enough room for the black key.\n");
	write_tag(job->tagged_key, job, black_len);
	err = cover_key(job->type, job->red, job->red_len,
			job->tagged_key + sizeof(struct tag_header));
	if (err)
		return err;
	return hand_out(job->cmd.black_key, job->tagged_key, len);
}

static int hand_out_blob(struct keygen_job *job)
{
	u32 sealed_len = blob_bytes(job->red_len);
	u32 len = sizeof(struct tag_header) + sealed_len;
	int err = 0;

	if (job->cmd.blob_len < len)
		err = complain_in_blob(job, -EINVAL, "Not enough room for the blob.\n");
	job->cmd.blob_len = len;
	if (err)
		return err;
	write_tag(job->tagged_blob, job, sealed_len);
	err = seal_blob(job->type, job->red, job->red_len,
			job->tagged_blob + sizeof(struct tag_header));
	if (err)
		return err;
	return hand_out(job->cmd.blob, job->tagged_blob, len);
}

static int keygen_create(struct keygen_job *job)
{
	int err = read_encapsulation(job);

	if (!err)
		err = read_key(job);
	if (!err)
		err = hand_out_key(job);
	if (!err)
		err = hand_out_blob(job);
	return err;
}

static int read_blob(struct keygen_job *job)
{
	u32 len = job->cmd.blob_len;

	/* Some of NXP's kernels copy any length into a buffer of this size; this refuses and logs it. */
	if (len > sizeof(job->tagged_blob)) {
		pr_warn_ratelimited("%u bytes are longer than any blob\n", len);
		return -EINVAL;
	}
	if (!len || !job->cmd.blob ||
	    copy_from_user(job->tagged_blob, u64_to_user_ptr(job->cmd.blob), len))
		return complain(-EFAULT, job->cmd.black_key, job->cmd.black_key_len,
				"Cannot read the blob.\n");
	return 0;
}

/*
 * Only the kernel log has the fault of a blob's tag or MAC. It is not an error message: those also go
 * to the serial console, which would delay a test that imports a thousand broken blobs.
 */
static int keygen_import(struct keygen_job *job)
{
	u32 len = job->cmd.blob_len;
	struct tag_header tag;
	int err;

	err = read_blob(job);
	if (err)
		return err;
	memcpy(&tag, job->tagged_blob, sizeof(tag));
	if (len < sizeof(tag) || check_tag(&tag) || tag.obj_len != blob_bytes(tag.red_key_len) ||
	    len != sizeof(tag) + tag.obj_len) {
		pr_warn_ratelimited("not a tagged blob\n");
		return -EINVAL;
	}
	job->type = tag.type;
	job->red_len = tag.red_key_len;
	err = open_blob(job->type, job->tagged_blob + sizeof(tag), job->red, job->red_len);
	if (err) {
		pr_warn_ratelimited("blob refused: %d%s\n", err, err == -EBADMSG ? " (MAC check)" : "");
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

/* The OTPMK of a closed part. Every open part has the same; a test's OTPMK is never this one. */
static int chip_key(u8 key[OTPMK_BYTES])
{
	bool given = otpmk[0] != '\0';

	if ((secure || given) &&
	    (strlen(otpmk) != 2 * OTPMK_BYTES || hex2bin(key, otpmk, OTPMK_BYTES))) {
		pr_err("otpmk must have 64 hex digits\n");
		return -EINVAL;
	}
	if (!secure)
		memcpy(key, "The test key of every open part.", OTPMK_BYTES);
	return 0;
}

static int __init caam_sim_init(void)
{
	u8 key[OTPMK_BYTES] = {};
	int err;

	BUILD_BUG_ON(sizeof(struct keygen_cmd) != 56);
	if (!present)
		return 0;
	err = chip_key(key);
	if (!err)
		err = seal_init(key);
	memzero_explicit(key, sizeof(key));
	if (err || !keygen)
		return err;
	err = tk_register();
	if (err)
		goto no_tk;
	err = power_register();
	if (err)
		goto no_power;
	err = misc_register(&keygen_device);
	if (err)
		goto no_device;
	return 0;

no_device:
	power_unregister();
no_power:
	tk_unregister();
no_tk:
	seal_exit();
	return err;
}

static void __exit caam_sim_exit(void)
{
	if (!present)
		return;
	if (keygen) {
		misc_deregister(&keygen_device);
		power_unregister();
		tk_unregister();
	}
	seal_exit();
}

module_init(caam_sim_init);
module_exit(caam_sim_exit);

MODULE_DESCRIPTION("Simulated CAAM: black keys, black blobs and tagged-key ciphers for tests");
MODULE_LICENSE("GPL");
/* sha256 and the AES used to cover keys are library functions; these are found by name. */
MODULE_SOFTDEP("pre: ccm ctr ecb cbc aes");
