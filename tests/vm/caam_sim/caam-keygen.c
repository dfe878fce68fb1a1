// SPDX-License-Identifier: GPL-2.0
/*
 * The board's tool for making and importing black keys, as far as the board procedure uses it:
 *
 *   caam-keygen create NAME ecb|ccm -s SIZE    a random key of SIZE bytes
 *   caam-keygen create NAME ecb|ccm -t TEXT    the bytes of TEXT as the key
 *   caam-keygen import BLOB_FILE NAME          the black key of a blob
 *
 * create writes /data/caam/NAME and NAME.bb, import writes /data/caam/NAME. Like the vendor's
 * tool it exits 0 whatever happens: a script that tests the exit status tests nothing.
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

#define FOLDER "/data/caam/"

static int complain(const char *what)
{
	fprintf(stderr, "caam-keygen: %s: %s\n", what, strerror(errno));
	return 0;
}

static int save(const char *name, const char *suffix, const void *bytes, size_t len)
{
	char path[4096];
	int file;

	snprintf(path, sizeof(path), FOLDER "%s%s", name, suffix);
	mkdir("/data", 0755);
	mkdir("/data/caam", 0700);
	file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file < 0)
		return complain(path);
	if (write(file, bytes, len) != (ssize_t)len)
		complain(path);
	close(file);
	return 0;
}

static int run(unsigned long request, struct keygen_cmd *cmd)
{
	int device = open("/dev/" KEYGEN_DEVICE, O_RDWR | O_CLOEXEC);
	int err;

	if (device < 0)
		return -1;
	err = ioctl(device, request, cmd);
	close(device);
	return err;
}

static int create(const char *name, const char *enc, const char *mode, const char *value)
{
	char key[TAGGED_KEY_MAX_BYTES], blob[TAGGED_BLOB_MAX_BYTES] = {};
	struct keygen_cmd cmd = {
		.key_enc_len = strlen(enc) + 1,
		.key_mode_len = strlen(mode) + 1,
		.key_value_len = strlen(value),
		.black_key_len = sizeof(key),
		.key_enc = (uintptr_t)enc,
		.key_mode = (uintptr_t)mode,
		.key_value = (uintptr_t)value,
		.black_key = (uintptr_t)key,
		.blob_len = sizeof(blob),
		.blob = (uintptr_t)blob,
	};

	if (run(KEYGEN_IOCTL_CREATE, &cmd)) {
		complain("create");
		fprintf(stderr, "%.*s\n", (int)sizeof(blob), blob);
		return 0;
	}
	save(name, "", key, cmd.black_key_len);
	return save(name, ".bb", blob, cmd.blob_len);
}

static int import(const char *blob_file, const char *name)
{
	char key[TAGGED_KEY_MAX_BYTES], blob[TAGGED_BLOB_MAX_BYTES];
	struct keygen_cmd cmd = {
		.black_key_len = sizeof(key),
		.black_key = (uintptr_t)key,
		.blob = (uintptr_t)blob,
	};
	int file = open(blob_file, O_RDONLY | O_CLOEXEC);
	ssize_t len;

	if (file < 0)
		return complain(blob_file);
	len = read(file, blob, sizeof(blob));
	close(file);
	if (len < 0)
		return complain(blob_file);
	cmd.blob_len = len;
	if (run(KEYGEN_IOCTL_IMPORT, &cmd))
		return complain("import");
	return save(name, "", key, cmd.black_key_len);
}

int main(int argc, char **argv)
{
	if (argc == 6 && !strcmp(argv[1], "create"))
		return create(argv[2], argv[3], argv[4], argv[5]);
	if (argc == 4 && !strcmp(argv[1], "import"))
		return import(argv[2], argv[3]);
	fputs("usage: caam-keygen create NAME ecb|ccm -s SIZE|-t TEXT\n"
	      "       caam-keygen import BLOB_FILE NAME\n", stderr);
	return 0;
}
