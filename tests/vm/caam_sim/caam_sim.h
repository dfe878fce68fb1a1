/* SPDX-License-Identifier: GPL-2.0 */
/* Interface between the simulated CAAM and its callers in user space. */
#ifndef CAAM_SIM_H
#define CAAM_SIM_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define KEYGEN_DEVICE "caam-keygen"

/* NXP's ABI: 56 bytes on 32- and 64-bit machines alike. */
struct keygen_cmd {
	__u8 key_enc_len;	/* NUL included */
	__u8 key_mode_len;	/* NUL included */
	__u16 key_value_len;	/* no NUL */
	__u32 black_key_len;	/* in: room, out: length */
	__aligned_u64 key_enc;	/* "ecb" or "ccm" */
	__aligned_u64 key_mode;	/* "-s": value is a size, "-t": value is the key */
	__aligned_u64 key_value;
	__aligned_u64 black_key;
	__u32 blob_len;		/* in: room or length, out: length */
	__aligned_u64 blob;
};

#define KEYGEN_IOCTL_CREATE _IOWR('K', 0, struct keygen_cmd)
#define KEYGEN_IOCTL_IMPORT _IOWR('K', 1, struct keygen_cmd)

/* Host byte order, as the driver writes it. */
struct tag_header {
	__u32 magic;
	__u32 version;
	__u32 type;
	__u32 red_key_len;
	__u32 obj_len;
};

#define TAG_MAGIC 0x5461674f
#define TAG_VERSION 0
#define TAG_TYPE_BLACK (1u << 0)
#define TAG_TYPE_CCM (1u << 3)
#define TAG_TYPE_ECB_KEY TAG_TYPE_BLACK
#define TAG_TYPE_MEMORY (1u << 31)	/* in no header; what is sealed is no black key */
#define TAG_TYPE_CCM_KEY (TAG_TYPE_BLACK | TAG_TYPE_CCM)

#define KEY_MIN_BYTES 16
#define KEY_MAX_BYTES 64
#define CCM_NONCE_BYTES 6
#define CCM_MAC_BYTES 6
#define CCM_OVERHEAD (CCM_NONCE_BYTES + CCM_MAC_BYTES)
#define BLOB_KEY_BYTES 32
#define BLOB_MAC_BYTES 16
#define KEY_MODIFIER_BYTES 16
#define BLOB_OVERHEAD (BLOB_KEY_BYTES + BLOB_MAC_BYTES)

/* The blob of an object reserves room for the CCM overhead whatever the covering. */
#define BLACK_KEY_MAX_BYTES (KEY_MAX_BYTES + CCM_OVERHEAD)
#define BLOB_MAX_BYTES (KEY_MAX_BYTES + CCM_OVERHEAD + BLOB_OVERHEAD)
#define TAGGED_KEY_MAX_BYTES (sizeof(struct tag_header) + BLACK_KEY_MAX_BYTES)
#define TAGGED_BLOB_MAX_BYTES (sizeof(struct tag_header) + BLOB_MAX_BYTES)

#ifdef __KERNEL__
#define OTPMK_BYTES 32
#define MEMORY_MAX_BYTES 512

/* main.c */
bool caam_present(void);

/* seal.c */
int seal_init(const u8 otpmk[OTPMK_BYTES]);
void seal_exit(void);
void renew_jdkek(void);
u32 black_key_bytes(u32 type, u32 red_len);
u32 blob_bytes(u32 red_len);
int cover_key(u32 type, const u8 *red, u32 red_len, u8 *black);
int uncover_key(u32 type, const u8 *black, u8 *red, u32 red_len);
int seal_blob(u32 type, const u8 *red, u32 red_len, u8 *blob);
int open_blob(u32 type, const u8 *blob, u8 *red, u32 red_len);
int seal_memory(const u8 modifier[KEY_MODIFIER_BYTES], const u8 *red, u32 len, u8 *blob);
int open_memory(const u8 modifier[KEY_MODIFIER_BYTES], const u8 *blob, u8 *red, u32 len);
int check_tag(const struct tag_header *tag);

/* tk.c */
int tk_register(void);
int tk_renew(void);
void tk_unregister(void);
#endif

#endif
