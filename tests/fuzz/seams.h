/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Included before the product's sources when they are built for the harness:
 * what would start a thread or call the system comes to the harness instead.
 */
#ifndef SEAMS_H
#define SEAMS_H

#define pthread_create fuzz_thread_create
#define pthread_join fuzz_thread_join
#define pthread_cond_wait fuzz_cond_wait
#define pthread_cond_signal fuzz_cond_signal
#define pthread_sigmask fuzz_sigmask
#define eventfd fuzz_eventfd
#define close fuzz_close
#define write fuzz_write
#define fallocate fuzz_fallocate
#define recv fuzz_recv
#define pread fuzz_pread
#define poll fuzz_poll
#define sync_file_range fuzz_sync_file_range

#endif
