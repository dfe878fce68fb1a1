// SPDX-License-Identifier: MIT
/*
 * The limit: the time of the kernel and udev when the serving program takes almost none.
 *
 *   limit LABELS BLOBS MOUNT_ROOT
 *
 * It waits for udev's events of partitions whose GPT label the pattern matches, makes the kernel
 * calls that the agent makes, and spawns nothing: BLOBS/LABEL.bb becomes a tagged key, the key a
 * logon key, that a mapping, and its ext4 is mounted at MOUNT_ROOT/LABEL. When the kernel reports that
 * the partition has gone, it removes mount, mapping and mount point. It serves one medium after the
 * other, trusts them, and exits at the first error: it is a measure, not a program to use.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <linux/dm-ioctl.h>
#include <linux/keyctl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

/* Prefixes of measurements: the udev rule keeps udev from opening such a mapping. */
#define BENCH_DM_NAME "caam-bench-limit-%s"
#define BENCH_DM_UUID "CAAM-BENCH-limit-%s"
#define BENCH_KEY "caam-bench:limit"

#define GROUP_KERNEL 1 /* groups of kobject-uevent: device-monitor.c in systemd */
#define GROUP_UDEV 2
#define EVENT_MAX_BYTES 8192
#define VOLUMES_MAX 256
#define TAGGED_KEY_MAX_BYTES (20 + 64 + 12) /* tag header, key, overhead of ccm */
#define TAGGED_BLOB_MAX_BYTES (TAGGED_KEY_MAX_BYTES + 48)

/* NXP's ABI: linux-imx, drivers/crypto/caam/caamkeygen.c */
struct keygen_cmd {
	uint8_t key_enc_len, key_mode_len;
	uint16_t key_value_len;
	uint32_t black_key_len; /* in: room, out: length */
	uint64_t key_enc, key_mode, key_value, black_key;
	uint32_t blob_len;
	uint64_t blob;
};
#define KEYGEN_IOCTL_IMPORT _IOWR('K', 1, struct keygen_cmd)

/* Header before the properties in udev's message: device-monitor.c in systemd */
struct udev_header {
	char prefix[8]; /* "libudev" */
	uint32_t magic; /* big endian */
	uint32_t header_size;
	uint32_t properties_off;
	uint32_t properties_len;
};
#define UDEV_MAGIC 0xfeedcafe

static struct {
	struct dm_ioctl head;
	struct dm_target_spec target;
	char parameters[512];
} dm;

static struct volume {
	char name[32]; /* of the partition; "" if the entry is free */
	char point[256];
} volumes[VOLUMES_MAX];

static const char *labels, *blobs, *mount_root;

__attribute__((format(printf, 1, 2))) static void die(const char *what, ...)
{
	int error = errno;
	va_list arguments;

	va_start(arguments, what);
	fputs("limit: ", stderr);
	vfprintf(stderr, what, arguments);
	fprintf(stderr, ": %s\n", strerror(error));
	exit(1);
}

static int listen_to(unsigned int group)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = group };
	int room = 16 << 20;
	int listener = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);

	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) ||
	    bind(listener, (struct sockaddr *)&address, sizeof(address)))
		die("listen to group %u", group);
	return listener;
}

/* Returns a property's value from KEY=VALUE texts that each end with a NUL, or "". */
static const char *property(const char *at, const char *end, const char *key)
{
	size_t len = strlen(key);

	for (; at < end; at += strlen(at) + 1)
		if (!strncmp(at, key, len) && at[len] == '=')
			return at + len + 1;
	return "";
}

static size_t read_file(const char *path, void *buffer, size_t room)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t len = file < 0 ? -1 : read(file, buffer, room);

	if (len < 0)
		die("read %s", path);
	close(file);
	return len;
}

static unsigned long long sectors_of(const char *name)
{
	char path[128], text[32] = {};

	snprintf(path, sizeof(path), "/sys/class/block/%s/size", name);
	read_file(path, text, sizeof(text) - 1);
	return strtoull(text, NULL, 10);
}

static uint32_t import_key(const char *label, char key[TAGGED_KEY_MAX_BYTES])
{
	char path[256], blob[TAGGED_BLOB_MAX_BYTES];
	struct keygen_cmd cmd = {
		.black_key_len = TAGGED_KEY_MAX_BYTES,
		.black_key = (uintptr_t)key,
		.blob = (uintptr_t)blob,
	};
	int device = open("/dev/caam-keygen", O_RDWR | O_CLOEXEC);

	snprintf(path, sizeof(path), "%s/%s.bb", blobs, label);
	cmd.blob_len = read_file(path, blob, sizeof(blob));
	if (device < 0 || ioctl(device, KEYGEN_IOCTL_IMPORT, &cmd))
		die("import %s", path);
	close(device);
	return cmd.black_key_len;
}

static void dm_call(unsigned long request, const char *name, uint32_t flags, uint32_t targets)
{
	static int control = -1;

	if (control < 0)
		control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
	dm.head = (struct dm_ioctl){
		.version = { 4, 0, 0 }, /* the lowest that the kernel takes: ctl_ioctl in dm-ioctl.c */
		.data_size = sizeof(dm),
		.data_start = offsetof(typeof(dm), target),
		.target_count = targets,
		.flags = flags,
	};
	snprintf(dm.head.name, sizeof(dm.head.name), BENCH_DM_NAME, name);
	if (request == DM_DEV_CREATE)
		snprintf(dm.head.uuid, sizeof(dm.head.uuid), BENCH_DM_UUID, name);
	if (control < 0 || ioctl(control, request, &dm))
		die("device-mapper's call %lu for %s", request & 0xff, name);
}

/* Returns the minor number of the live mapping. */
static unsigned int map(const char *name, const char *label, const char *major,
			const char *minor_of_it)
{
	char key[TAGGED_KEY_MAX_BYTES];
	uint32_t len = import_key(label, key);
	long serial = syscall(SYS_add_key, "logon", BENCH_KEY, key, (size_t)len,
			      KEY_SPEC_SESSION_KEYRING);
	unsigned int number;

	explicit_bzero(key, sizeof(key));
	if (serial < 0)
		die("add the key");
	dm_call(DM_DEV_CREATE, name, 0, 0);
	dm.target = (struct dm_target_spec){ .length = sectors_of(name), .target_type = "crypt" };
	snprintf(dm.parameters, sizeof(dm.parameters),
		 "capi:tk(cbc(aes))-plain :%u:logon:" BENCH_KEY " 0 %s:%s 0", len, major,
		 minor_of_it);
	dm_call(DM_TABLE_LOAD, name, DM_SECURE_DATA_FLAG, 1);
	/* dm-crypt has its copy: crypt_set_keyring_key in dm-crypt.c */
	if (syscall(SYS_keyctl, KEYCTL_UNLINK, serial, KEY_SPEC_SESSION_KEYRING))
		die("unlink the key");
	dm_call(DM_DEV_SUSPEND, name, 0, 0); /* without DM_SUSPEND_FLAG it resumes */
	number = minor(dm.head.dev);
	return number;
}

/* Returns the entry of the partition; "" finds a free entry. NULL if there is none. */
static struct volume *find(const char *name)
{
	for (struct volume *at = volumes; at < volumes + VOLUMES_MAX; at++)
		if (!strcmp(at->name, name))
			return at;
	return NULL;
}

static void arrive(const char *label, const char *at, const char *end)
{
	const char *name = strrchr(property(at, end, "DEVNAME"), '/');
	struct volume *volume = find("");
	char node[32];

	if (!name || !volume || find(name + 1))
		return;
	snprintf(volume->name, sizeof(volume->name), "%s", name + 1);
	snprintf(volume->point, sizeof(volume->point), "%s/%s", mount_root, label);
	snprintf(node, sizeof(node), "/dev/dm-%u",
		 map(volume->name, label, property(at, end, "MAJOR"), property(at, end, "MINOR")));
	if (mkdir(volume->point, 0500) && errno != EEXIST)
		die("make %s", volume->point);
	if (mount(node, volume->point, "ext4", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
		die("mount %s", volume->point);
}

static void depart(struct volume *volume)
{
	if (umount2(volume->point, UMOUNT_NOFOLLOW))
		die("unmount %s", volume->point);
	dm_call(DM_DEV_REMOVE, volume->name, DM_DEFERRED_REMOVE, 0);
	if (rmdir(volume->point))
		die("remove %s", volume->point);
	volume->name[0] = '\0';
}

static void event_of_udev(const char *event, const char *end)
{
	const struct udev_header *header = (const void *)event;
	const char *at, *label;

	if (end - event < (ptrdiff_t)sizeof(*header) || strcmp(header->prefix, "libudev") ||
	    header->magic != htonl(UDEV_MAGIC) || header->properties_off > end - event)
		return;
	at = event + header->properties_off;
	label = property(at, end, "ID_PART_ENTRY_NAME");
	if (!strcmp(property(at, end, "ACTION"), "add") &&
	    !strcmp(property(at, end, "DEVTYPE"), "partition") && !fnmatch(labels, label, 0))
		arrive(label, at, end);
}

static void event_of_kernel(const char *event, const char *end)
{
	const char *name = property(event, end, "DEVNAME");
	struct volume *volume = name[0] ? find(name) : NULL;

	if (volume && !strcmp(property(event, end, "ACTION"), "remove") &&
	    !strcmp(property(event, end, "SUBSYSTEM"), "block"))
		depart(volume);
}

static void receive(int listener, void (*handle)(const char *event, const char *end))
{
	_Alignas(struct udev_header) char event[EVENT_MAX_BYTES + 1];
	ssize_t len = recv(listener, event, EVENT_MAX_BYTES, 0);

	if (len < 0)
		die("hear of devices");
	event[len] = '\0';
	handle(event, event + len);
}

/* Reports to the service manager that no later event is missed: sd_notify(3). */
static void say_ready(void)
{
	struct sockaddr_un manager = { .sun_family = AF_UNIX };
	const char *path = getenv("NOTIFY_SOCKET");
	int outlet;

	if (!path || strlen(path) >= sizeof(manager.sun_path))
		return;
	strcpy(manager.sun_path, path);
	if (manager.sun_path[0] == '@')
		manager.sun_path[0] = '\0';
	outlet = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (outlet < 0 || sendto(outlet, "READY=1", 7, 0, (struct sockaddr *)&manager,
				 offsetof(struct sockaddr_un, sun_path) + strlen(path)) < 0)
		die("say ready");
	close(outlet);
}

int main(int argc, char **argv)
{
	struct pollfd heard[2] = { { .events = POLLIN }, { .events = POLLIN } };

	if (argc != 4) {
		fputs("usage: limit LABELS BLOBS MOUNT_ROOT\n", stderr);
		return 2;
	}
	labels = argv[1];
	blobs = argv[2];
	mount_root = argv[3];
	heard[0].fd = listen_to(GROUP_KERNEL);
	heard[1].fd = listen_to(GROUP_UDEV);
	say_ready();
	for (;;) {
		if (poll(heard, 2, -1) < 0)
			die("wait");
		if (heard[0].revents)
			receive(heard[0].fd, event_of_kernel);
		if (heard[1].revents)
			receive(heard[1].fd, event_of_udev);
	}
}
