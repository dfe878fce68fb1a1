// SPDX-License-Identifier: GPL-2.0
/* Replaces the kernel's own key type `encrypted` by one that supports trusted masters. */
#include <linux/key-type.h>

extern struct key_type key_type_encrypted;

int swap_in_key_type(struct key_type *ours);
void swap_out_key_type(struct key_type *ours);

int swap_in_key_type(struct key_type *ours)
{
	unregister_key_type(&key_type_encrypted);
	return register_key_type(ours);
}

void swap_out_key_type(struct key_type *ours)
{
	unregister_key_type(ours);
	if (register_key_type(&key_type_encrypted))
		pr_err("the kernel's own encrypted keys are gone\n");
}
