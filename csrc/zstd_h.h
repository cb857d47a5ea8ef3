/* SPDX-License-Identifier: Apache-2.0 */
/*
 * zstd_h.h - zstd.h, or a sentence of what to install.
 */
#ifndef PL_ZSTD_H
#define PL_ZSTD_H

#ifdef __has_include
#if !__has_include(<zstd.h>)
#error "zstd.h is missing: install libzstd-dev (Debian, Ubuntu), libzstd-devel (Fedora) or zstd-dev (Alpine)"
#endif
#endif
#include <zstd.h>

#endif
