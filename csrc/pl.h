/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pl.h - the native core of pyploop: bytes in, 0 / +n / -errno out.
 *
 * Rules that hold for everything declared in the headers below
 *   - No function knows Python.  None prints.  None exits.
 *   - Success is 0 or a count, failure is -errno.  Arguments are checked
 *     before any state is changed.
 *   - Positions and lengths are bytes (uint64_t); ranges are half-open
 *     [start, end).  A source is addressed relative to its own first byte,
 *     also when it is a partition or the middle of a backing file.
 *   - An object that pl_X_new or pl_X_open made is given back with pl_X_free
 *     or pl_X_close, which accept NULL.
 *   - File descriptors are borrowed, never closed, unless a comment says so.
 *   - Calls on one object come from one thread at a time; the exceptions
 *     (cancel, progress) are marked "any thread".
 */
#ifndef PL_H
#define PL_H

#include "bitmap.h"
#include "bpf.h"
#include "bundle.h"
#include "files_in.h"
#include "files_out.h"
#include "gate.h"
#include "hash.h"
#include "intake.h"
#include "io.h"
#include "known.h"
#include "mux_wire.h"
#include "ploop.h"
#include "prior.h"
#include "proof.h"
#include "pump.h"
#include "recv.h"

#endif
