// SPDX-License-Identifier: GPL-2.0
/*
 * The interface of mainline's CAAM driver for the kernel's trusted keys (soc/fsl/caam-blob.h): it
 * seals the caller's memory into a blob, and unseals it. The caller sees the key; nothing is covered.
 */
#include <linux/err.h>
#include <linux/module.h>
#include <soc/fsl/caam-blob.h>

#include "caam_sim.h"

/* The hardware allocates job rings here; the simulation has none. */
static u8 no_state;

struct caam_blob_priv *caam_blob_gen_init(void)
{
	return caam_present() ? (struct caam_blob_priv *)&no_state : ERR_PTR(-ENODEV);
}
EXPORT_SYMBOL(caam_blob_gen_init);

void caam_blob_gen_exit(struct caam_blob_priv *priv)
{
}
EXPORT_SYMBOL(caam_blob_gen_exit);

int caam_process_blob(struct caam_blob_priv *priv, struct caam_blob_info *info, bool encap)
{
	u8 modifier[KEY_MODIFIER_BYTES] = {};
	size_t len = encap ? info->input_len : info->input_len - CAAM_BLOB_OVERHEAD;
	int err;

	BUILD_BUG_ON(CAAM_BLOB_OVERHEAD != BLOB_OVERHEAD);
	BUILD_BUG_ON(CAAM_BLOB_KEYMOD_LENGTH != KEY_MODIFIER_BYTES);
	if (info->key_mod_len > KEY_MODIFIER_BYTES || len > MEMORY_MAX_BYTES)
		return -EINVAL;
	memcpy(modifier, info->key_mod, info->key_mod_len);
	if (encap)
		err = seal_memory(modifier, info->input, len, info->output);
	else
		err = open_memory(modifier, info->input, info->output, len);
	if (!err)
		info->output_len = encap ? len + CAAM_BLOB_OVERHEAD : len;
	return err;
}
EXPORT_SYMBOL(caam_process_blob);
