# cython: language_level=3
# SPDX-License-Identifier: Apache-2.0
"""csrc/pl.h as Cython sees it."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "pl.h" nogil:
    struct pl_extent:
        uint64_t start
        uint64_t end

    struct pl_bitmap:
        uint64_t *word
        uint64_t nwords
        uint64_t nbits
        uint64_t size
        uint32_t shift

    int pl_bitmap_init(pl_bitmap *b, uint64_t size, uint32_t shift)
    void pl_bitmap_fini(pl_bitmap *b)
    void pl_bitmap_zero(pl_bitmap *b)
    void pl_bitmap_set(pl_bitmap *b, uint64_t start, uint64_t end)
    void pl_bitmap_clear(pl_bitmap *b, uint64_t start, uint64_t end)
    int pl_bitmap_and(pl_bitmap *dst, const pl_bitmap *src, bint invert)
    int pl_bitmap_or_scaled(pl_bitmap *dst, const pl_bitmap *src)
    uint64_t pl_bitmap_count(const pl_bitmap *b)
    uint64_t pl_bitmap_bytes(const pl_bitmap *b)
    int pl_bitmap_next(const pl_bitmap *b, uint64_t start, pl_extent *run)

    enum pl_dialect:
        PL_DIALECT_NONE
        PL_DIALECT_D1
        PL_DIALECT_D2

    enum:
        PL_DIGEST

    ctypedef int (*pl_digest)(void *ctx, const void *data, size_t len,
                              uint8_t *out) noexcept

    enum:
        PL_LANES
        PL_BARRIER_NAMES

    struct pl_lane_end:
        uint32_t lane
        uint64_t received

    int pl_fdatasync(int fd)

    uint64_t pl_hash_block(const void *data, size_t len)
    uint64_t pl_hash_block_ref(const void *data, size_t len)
    bint pl_is_zero(const void *data, size_t len)
    const char *pl_hash_kernel()

    void pl_hash128(const void *data, size_t len, uint8_t *out)
    void pl_hash128_ref(const void *data, size_t len, uint8_t *out)

    enum:
        PL_HASH128
        PL_PROOF_FANOUT
        PL_PROOF_ALGORITHM

    struct pl_proof_level:
        uint8_t (*node)[16]
        uint64_t nodes

    struct pl_proof:
        uint64_t *leaf
        uint64_t blocks
        uint64_t size
        unsigned levels
        pl_proof_level level[6]

    int pl_proof_init(pl_proof *p, uint64_t size)
    void pl_proof_fini(pl_proof *p)
    void pl_proof_note(pl_proof *p, const void *data, size_t len, uint64_t pos)
    int pl_proof_root(pl_proof *p, int fd, uint8_t *root)
    int pl_proof_differ(const pl_proof *a, const pl_proof *b, uint64_t start,
                        pl_extent *run)

    enum:
        PL_PRIOR_KEY
        PL_PRIOR_CELL
        PL_PRIOR_DIGEST
        PL_PRIOR_MAX

    struct pl_prior_cell:
        uint64_t pos
        uint64_t size

    struct pl_prior:
        uint64_t size

    int pl_prior_cell_init(pl_prior_cell *c, const uint8_t *random, uint64_t size)
    void pl_prior_cell_fini(pl_prior_cell *c)
    void pl_prior_cell_begin(pl_prior_cell *c, uint64_t pos)
    int pl_prior_cell_read(pl_prior_cell *c, int fd, int copy_fd, uint64_t start,
                           uint64_t end, pl_proof *proof)
    uint32_t pl_prior_cell_tell(const pl_prior_cell *c, uint8_t *out, uint32_t *blocks,
                                uint32_t *digests)
    int pl_prior_init(pl_prior *p, const uint8_t *random, uint64_t size)
    void pl_prior_fini(pl_prior *p)
    struct pl_known:
        pl_bitmap nonzero
        uint64_t *hash
        uint64_t nchunks
        uint64_t size
        uint32_t shift

    int pl_known_init(pl_known *k, uint64_t size, uint32_t shift)
    void pl_known_fini(pl_known *k)
    void pl_known_assume_data(pl_known *k, uint64_t start, uint64_t end)
    int pl_known_note(pl_known *k, uint64_t start, const uint8_t *data, uint64_t len)

    int pl_prior_load(pl_prior *p, pl_known *known, uint64_t pos, uint32_t blocks,
                      uint32_t digests, const uint8_t *data, uint32_t size)
    void pl_prior_forget(pl_prior *p, uint64_t start, uint64_t end)

    ctypedef int (*pl_hook)(void *ctx, uint64_t start, uint64_t end)

    enum pl_sink:
        PL_SINK_FRAMES
        PL_SINK_FILE
        PL_SINK_PACKETS
        PL_SINK_NONE

    enum pl_compress:
        PL_COMPRESS_NEVER
        PL_COMPRESS_AUTO
        PL_COMPRESS_ALWAYS

    enum pl_pass_flags:
        PL_PASS_SKIP_ZERO
        PL_PASS_CHANGED
        PL_PASS_HOLES
        PL_PASS_LAST
        PL_PASS_HOOK
        PL_PASS_LIVE
        PL_PASS_PRIOR

    enum pl_stage:
        PL_STAGE_NONE
        PL_STAGE_READ
        PL_STAGE_WRITE
        PL_STAGE_HOOK
        PL_STAGE_PROTOCOL
        PL_STAGE_REPLY

    struct pl_direct_cfg:
        uint32_t block
        uint32_t memory

    struct pl_pump_cfg:
        int src_fd
        uint64_t src_base
        uint64_t size
        uint32_t align
        uint32_t tail
        int tail_fd
        uint64_t tail_pos
        int out_fd
        pl_sink sink
        pl_direct_cfg direct
        uint32_t ahead
        uint32_t zero_holes
        uint32_t cluster
        uint32_t slots
        uint32_t readers
        uint32_t stall_ms
        uint32_t lane_stall_ms
        uint64_t rate
        pl_known *known
        pl_proof *proof
        const pl_prior *prior
        pl_hook hook
        void *hook_ctx
        uint64_t features
        pl_compress compress
        int level
        bint async_ "async"
        uint32_t window
        pl_digest digest
        void *digest_ctx

    struct pl_pump_stats:
        uint64_t read_bytes
        uint64_t data_bytes
        uint64_t wire_bytes
        uint64_t zero_bytes
        uint64_t same_bytes
        uint64_t frames
        uint64_t done_bytes
        uint64_t huge_bytes
        uint64_t packed_bytes
        uint64_t packed_frames
        uint64_t direct_bytes
        uint64_t filled_bytes
        uint64_t again_bytes

    struct pl_fault:
        pl_stage stage
        uint64_t pos
        uint64_t stream
        uint64_t frame
        uint32_t mark
        uint32_t size
        uint32_t type
        uint32_t command
        int32_t reply
        uint32_t lane

    struct pl_pump:
        pass

    int pl_pump_new(pl_pump **out, const pl_pump_cfg *cfg)
    void pl_pump_free(pl_pump *p)
    int pl_pump_pass(pl_pump *p, const pl_extent *ext, size_t n,
                     unsigned flags, pl_fault *fault)
    int pl_pump_write(pl_pump *p, const void *buf, size_t len, pl_fault *fault)
    int pl_pump_ask(pl_pump *p, const void *buf, size_t len,
                    uint32_t timeout_ms, pl_fault *fault)
    int pl_pump_add_lane(pl_pump *p, int fd, uint32_t number)

    struct pl_pump_lane:
        uint32_t number
        int32_t err
        uint64_t bytes

    unsigned pl_pump_get_lanes "pl_pump_lanes"(pl_pump *p, pl_pump_lane *out)
    int pl_pump_settle(pl_pump *p, const pl_lane_end *ends, unsigned n)
    int pl_pump_resend(pl_pump *p, pl_fault *fault)
    int pl_pump_relink(pl_pump *p, int fd, const pl_lane_end *ends, unsigned n)
    uint64_t pl_pump_floor(pl_pump *p)
    void pl_pump_disconnect(pl_pump *p)
    void pl_pump_limit(pl_pump *p, uint64_t rate)
    void pl_pump_frozen(pl_pump *p, bint frozen)
    void pl_pump_cancel(pl_pump *p)
    void pl_pump_get_stats "pl_pump_stats"(const pl_pump *p, pl_pump_stats *out)

    enum pl_recv_event:
        PL_RECV_SYNC
        PL_RECV_END
        PL_RECV_QUESTION
        PL_RECV_LOST
        PL_RECV_BROKEN

    struct pl_recv_cfg:
        int in_fd
        int out_fd
        uint32_t slots
        uint32_t slot_size
        uint32_t max_frame
        uint32_t stall_ms
        uint64_t window
        uint32_t lane_stall_ms
        uint32_t sparse
        uint64_t old_end
        uint64_t largest
        uint32_t fill
        pl_direct_cfg direct
        uint32_t writers
        uint32_t ahead
        int reply_fd
        pl_digest digest
        void *digest_ctx

    struct pl_recv_stats:
        uint64_t stream_bytes
        uint64_t data_bytes
        uint64_t frames
        uint64_t written_bytes
        uint64_t hole_bytes
        uint64_t image_size
        uint64_t huge_bytes
        uint64_t packed_bytes
        uint64_t packed_frames
        uint64_t direct_bytes
        uint64_t filled_bytes

    struct pl_recv_msg:
        uint64_t pos
        uint8_t data[4]
        uint64_t first_ns, arrived_ns, written_ns, dirty_bytes

    struct pl_recv:
        pass

    int pl_recv_new(pl_recv **out, const pl_recv_cfg *cfg)
    void pl_recv_free(pl_recv *r)
    int pl_recv_run(pl_recv *r, pl_recv_msg *msg, pl_fault *fault)
    pl_dialect pl_recv_dialect(const pl_recv *r)
    int pl_recv_expect_digests(pl_recv *r)
    int pl_recv_expect(pl_recv *r, uint64_t features)
    int pl_recv_expect_proof(pl_recv *r, pl_proof *proof)
    const uint8_t *pl_recv_proof_data(const pl_recv *r, uint32_t *len)
    void pl_recv_reopen(pl_recv *r)
    int pl_recv_add_lane(pl_recv *r, int fd, uint32_t number)
    void pl_recv_end_lanes(pl_recv *r)
    void pl_recv_relink(pl_recv *r, int fd)
    void pl_recv_disconnect(pl_recv *r)
    unsigned pl_recv_lost(pl_recv *r, pl_lane_end *out)
    void pl_recv_synced(pl_recv *r)
    void pl_recv_cancel(pl_recv *r)
    void pl_recv_get_stats "pl_recv_stats"(pl_recv *r, pl_recv_stats *out)

    struct pl_ploop:
        int fd

    int pl_ploop_start(pl_ploop *t, uint64_t size)
    int pl_ploop_setpos(void *t, uint64_t start, uint64_t end)
    int pl_ploop_next(pl_ploop *t, pl_extent *dirty)
    int pl_ploop_sync(pl_ploop *t)
    int pl_ploop_stop(pl_ploop *t)
    int pl_ploop_abort(pl_ploop *t)

    enum pl_bpf_source:
        PL_BPF_RQ
        PL_BPF_BIO
        PL_BPF_QUEUE

    struct pl_bpf_cfg:
        uint32_t major
        uint32_t minor
        uint64_t start
        uint64_t end
        uint32_t done_shift
        uint32_t queued_shift
        pl_bpf_source source

    struct pl_bpf_counters:
        uint64_t done_write
        uint64_t done_discard
        uint64_t queued_write
        uint64_t queued_discard
        uint64_t everything

    struct pl_bpf:
        pass

    int pl_bpf_open(pl_bpf **out, const pl_bpf_cfg *cfg, char *why, size_t why_len)
    void pl_bpf_close(pl_bpf *t)
    int pl_bpf_take_done(pl_bpf *t, pl_bitmap *into)
    int pl_bpf_take_runs(pl_bpf *t, pl_hook run, void *ctx)
    int pl_bpf_take_queued(pl_bpf *t, pl_bitmap *into)
    uint64_t pl_bpf_peek_done(const pl_bpf *t)
    int pl_bpf_forget(void *tracker, uint64_t start, uint64_t end)

    struct pl_bpf_snapshot:
        pl_bpf_counters before
        pl_bpf_counters after
        uint64_t stat_write
        uint64_t stat_discard
        uint64_t inflight
        int stable

    int pl_bpf_take_snapshot "pl_bpf_snapshot"(
        const pl_bpf *t, int stat_fd, unsigned tries, pl_bpf_snapshot *out)

    struct pl_gate:
        pass

    int pl_gate_new(pl_gate **out, int fd)
    void pl_gate_free(pl_gate *g)
    int pl_gate_enter(pl_gate *g, bint urgent, uint32_t ms)
    void pl_gate_leave(pl_gate *g)
    void pl_gate_shut(pl_gate *g)

    struct pl_bundle:
        pass
    struct pl_bundle_lane:
        uint32_t number
        int32_t error
        bint ended

    int pl_bundle_new(pl_bundle **out, int fd, uint32_t stall_ms)
    void pl_bundle_free(pl_bundle *b)
    int pl_bundle_add(pl_bundle *b, int rfd, int wfd, uint32_t number)
    int pl_bundle_run(pl_bundle *b)
    void pl_bundle_stop(pl_bundle *b)
    uint64_t pl_bundle_moved(const pl_bundle *b)
    unsigned pl_bundle_lanes(pl_bundle *b, pl_bundle_lane *to, unsigned most)

    struct pl_files_out_cfg:
        pl_gate *gate
        uint16_t channel
        uint64_t window
        uint64_t rate
        uint32_t stall_ms
        uint32_t silence_ms

    struct pl_files_out_stats:
        uint64_t data_bytes
        uint64_t zero_bytes

    struct pl_files_out:
        pass

    int pl_files_out_new(pl_files_out **out, const pl_files_out_cfg *cfg)
    void pl_files_out_free(pl_files_out *o)
    int pl_files_out_grow(pl_files_out *o, const char *name, uint16_t len, uint16_t mode,
                          int fd, uint64_t *pos, pl_stage *stage)
    int pl_files_out_complete(pl_files_out *o, const char *name, uint16_t len,
                              uint16_t mode, uint64_t size, pl_stage *stage)
    int pl_files_out_credit(pl_files_out *o, uint32_t bytes)
    void pl_files_out_stop(pl_files_out *o, int err)
    void pl_files_out_get_stats(const pl_files_out *o, pl_files_out_stats *to)

    enum:
        PL_PIECE_NAME

    struct pl_files_in_cfg:
        pl_gate *gate
        uint16_t channel
        uint64_t window
        uint32_t stall_ms
        uint32_t silence_ms

    struct pl_piece:
        uint16_t name_len
        uint16_t mode
        uint32_t length
        uint64_t pos
        char name[PL_PIECE_NAME]

    struct pl_files_in:
        pass

    int pl_files_in_new(pl_files_in **out, const pl_files_in_cfg *cfg)
    void pl_files_in_free(pl_files_in *f)
    int pl_files_in_next(pl_files_in *f, pl_piece *p, pl_stage *stage)
    int pl_files_in_take(pl_files_in *f, int fd, uint32_t most, uint64_t largest,
                         uint64_t *budget, pl_piece *p, pl_stage *stage)
    void pl_files_in_finish(pl_files_in *f)
    void pl_files_in_stop(pl_files_in *f, int err)

    struct pl_intake_cfg:
        int fd
        int stop_fd
        uint32_t silence_ms
        const uint8_t *early
        size_t early_len

    struct pl_intake:
        pass

    int pl_intake_new(pl_intake **out, const pl_intake_cfg *cfg)
    void pl_intake_free(pl_intake *i)
    int pl_intake_read(pl_intake *i, void *buf, size_t len)
    int pl_intake_head(pl_intake *i, uint8_t *head)
    int pl_intake_add(pl_intake *i, pl_files_in *f)
    void pl_intake_remove(pl_intake *i, pl_files_in *f)
