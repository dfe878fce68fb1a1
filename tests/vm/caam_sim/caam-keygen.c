// SPDX-License-Identifier: GPL-2.0
/*
 * The board's tool for making and importing black keys, with the commands of the board procedure:
 *
 *   caam-keygen create NAME ecb|ccm -s SIZE    a random key of SIZE bytes
 *   caam-keygen create NAME ecb|ccm -t TEXT    the bytes of TEXT as the key
 *   caam-keygen import BLOB_FILE NAME          the black key of a blob
 *
 * create writes /data/caam/NAME and NAME.bb, import writes /data/caam/NAME. Like the vendor's
 * tool it always exits with 0: a script that checks the exit status checks nothing.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "caam_sim.h"

#define FOLDER "/data/caam"

static void complain(const char *what, int error)
{
	fprintf(stderr, "caam-keygen: %s: %s\n", what, strerror(error));
}

static int make_folder(void)
{
	if ((mkdir("/data", 0755) && errno != EEXIST) || (mkdir(FOLDER, 0700) && errno != EEXIST)) {
		complain(FOLDER, errno);
		return -1;
	}
	return 0;
}

static void save(const char *name, const char *suffix, const void *bytes, size_t len)
{
	char path[4096];
	ssize_t written;
	int file;

	if (make_folder())
		return;
	if (snprintf(path, sizeof(path), FOLDER "/%s%s", name, suffix) >= (int)sizeof(path)) {
		complain(name, ENAMETOOLONG);
		return;
	}
	file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	/* A file that was there before keeps its mode through open(). */
	if (file < 0 || fchmod(file, 0600)) {
		complain(path, errno);
	} else {
		written = write(file, bytes, len);
		if (written != (ssize_t)len)
			complain(path, written < 0 ? errno : ENOSPC);
	}
	if (file >= 0)
		close(file);
}

/* Returns 0 or the error of open() or ioctl(). */
static int ask(unsigned long request, struct keygen_cmd *cmd)
{
	int device = open("/dev/" KEYGEN_DEVICE, O_RDWR | O_CLOEXEC);
	int err;

	if (device < 0)
		return errno;
	err = ioctl(device, request, cmd) ? errno : 0;
	close(device);
	return err;
}

static void create(const char *name, const char *enc, const char *mode, const char *value)
{
	char key[TAGGED_KEY_MAX_BYTES], blob[TAGGED_BLOB_MAX_BYTES] = {};
	struct keygen_cmd cmd = {
		.key_enc_len = strnlen(enc, UINT8_MAX - 1) + 1,
		.key_mode_len = strnlen(mode, UINT8_MAX - 1) + 1,
		.key_value_len = strnlen(value, UINT16_MAX),
		.black_key_len = sizeof(key),
		.key_enc = (uintptr_t)enc,
		.key_mode = (uintptr_t)mode,
		.key_value = (uintptr_t)value,
		.black_key = (uintptr_t)key,
		.blob_len = sizeof(blob),
		.blob = (uintptr_t)blob,
	};
	int err = ask(KEYGEN_IOCTL_CREATE, &cmd);

	if (err) {
		complain("create", err);
		/* The driver's message is in place of the blob. */
		fprintf(stderr, "%.*s", (int)sizeof(blob), blob);
		return;
	}
	save(name, "", key, cmd.black_key_len);
	save(name, ".bb", blob, cmd.blob_len);
}

/* Returns the blob's length or -1; nothing longer than a blob may be handed to the driver. */
static ssize_t read_blob(const char *path, char *blob, size_t room)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t len;

	if (file < 0) {
		complain(path, errno);
		return -1;
	}
	len = read(file, blob, room + 1);
	if (len < 0)
		complain(path, errno);
	close(file);
	if (len > (ssize_t)room) {
		complain(path, EFBIG);
		return -1;
	}
	return len;
}

static void import(const char *path, const char *name)
{
	char key[TAGGED_KEY_MAX_BYTES] = {}, blob[TAGGED_BLOB_MAX_BYTES + 1];
	ssize_t len = read_blob(path, blob, TAGGED_BLOB_MAX_BYTES);
	struct keygen_cmd cmd = {
		.black_key_len = sizeof(key),
		.black_key = (uintptr_t)key,
		.blob_len = len,
		.blob = (uintptr_t)blob,
	};
	int err;

	if (len < 0)
		return;
	err = ask(KEYGEN_IOCTL_IMPORT, &cmd);
	if (err)
		complain("import", err);
	else
		save(name, "", key, cmd.black_key_len);
}

int main(int argc, char **argv)
{
	if (argc == 6 && !strcmp(argv[1], "create"))
		create(argv[2], argv[3], argv[4], argv[5]);
	else if (argc == 4 && !strcmp(argv[1], "import"))
		import(argv[2], argv[3]);
	else
		fputs("usage: caam-keygen create NAME ecb|ccm -s SIZE|-t TEXT\n"
		      "       caam-keygen import BLOB_FILE NAME\n", stderr);
	return 0;
}
