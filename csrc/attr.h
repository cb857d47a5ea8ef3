/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attr.h - what a declaration promises, for the compiler to check in callers.
 * A compiler that does not know one of these takes no notice of it.
 */
#ifndef PL_ATTR_H
#define PL_ATTR_H

/* The result says whether it worked; nobody may drop it. */
#define PL_CHECKED __attribute__((warn_unused_result))
/* All pointers, or those of these positions (from 1), point to something. */
#define PL_NONNULL __attribute__((nonnull))
#define PL_NONNULL_AT(...) __attribute__((nonnull(__VA_ARGS__)))

/* The argument at `ptr` points to as many elements as the one at `len` says, which
   are only read, or only written. */
#if defined(__has_attribute)
#if __has_attribute(access)
#define PL_READS(ptr, len) __attribute__((access(read_only, ptr, len)))
#define PL_WRITES(ptr, len) __attribute__((access(write_only, ptr, len)))
#endif
#endif
#ifndef PL_READS
#define PL_READS(ptr, len)
#define PL_WRITES(ptr, len)
#endif

#endif
