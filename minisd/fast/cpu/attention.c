// Attention in bfloat16 on processors with AVX-512 BF16: compiled.py builds it and says for what.
//
// softmax(q k^T / sqrt(d)) v, block of keys by block of keys (Dao et al., FlashAttention, 2022), so that no score leaves the cache.
// All vectors have 16 rows of queries side by side: maxima and sums are taken without shuffling, a key or a value is broadcast
// from memory, and a head of 40 channels is 40 channels of work.  _mm512_dpbf16_ps multiplies pairs of neighbours, so queries
// and keys are stored by pairs of channels, weights and values by pairs of keys.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    KEYS = 128,     // of a block: 16 KB of scores, which stay in the first cache with the keys and values of a narrow head
    TILE = 8,       // keys, or channels of values, of a product at a time:
    ROWS = 2,       // with so many vectors of queries 16 sums, as many as the two multipliers of a core can have under way
    WIDEST = 512,   // channels of a head
    HELD = 1 << 16, // sums of a task: 256 KB, a part of the second cache
    LONGEST = 96,   // vectors of queries of a task
};

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint16_t *q, *k, *v; // (batch, length, heads*d), (batch, keys, heads*d) twice: channels next to each other
    uint16_t *out;             // (batch, length, heads*d), contiguous
    int64_t q_batch, q_row, k_batch, k_row, v_batch, v_row; // strides
    int64_t batch, heads, length, keys, d;
    int64_t parts, next; // tasks of a head, and the next of all that nobody has taken
} Job;

static _Thread_local struct {
    uint32_t q[HELD / 2], k[KEYS * WIDEST / 2]; // (pairs of channels, 16) of 16 queries or keys each; queries ROWS * 16 together
    uint32_t v[KEYS / 2 * WIDEST];              // (pairs of keys, width)
    uint32_t weights[KEYS / 2 * ROWS * 16];     // (pairs of keys, R, 16)
    float scores[KEYS * ROWS * 16];             // (keys, R, 16)
    float out[HELD];                            // (width, R, 16) of each R vectors of queries
    float most[LONGEST * 16], sum[LONGEST * 16], top[ROWS * 16];
} own __attribute__((aligned(64))); // 600 KB of each thread, and they stay: what is new comes page by page

INLINE __mmask32 first(int64_t n) { return n >= 32 ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1; }

INLINE __m512i lanes(void) { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// 16 by 16 numbers: blocks of 1, 2, 4 and 8 change places across the diagonal.
INLINE void transpose(__m512i x[16]) {
    for (int s = 1; s < 16; s *= 2) {
        const __mmask16 odd = s == 1 ? 0xaaaa : s == 2 ? 0xcccc : s == 4 ? 0xf0f0 : 0xff00;
        const __m512i low = _mm512_mask_add_epi32(lanes(), odd, lanes(), _mm512_set1_epi32(16 - s));
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(s));
        for (int i = 0; i < 16; i++)
            if (!(i & s)) {
                __m512i a = x[i], b = x[i + s];
                x[i] = _mm512_permutex2var_epi32(a, low, b);
                x[i + s] = _mm512_permutex2var_epi32(a, high, b);
            }
    }
}

// a and b rounded to bfloat16, to nearest even, each lane's two beside each other.
INLINE __m512i paired(__m512 a, __m512 b) {
    const __m512i order = _mm512_or_si512(lanes(), _mm512_slli_epi32(_mm512_add_epi32(lanes(), _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// 2^x for x up to 40: a polynomial on [0, 1), 9e-5 of the value off, exactly 1 at 0.  2^-inf is 0, as scalef has a rule for it.
INLINE __m512 power_of_2(__m512 x) {
    __m512 f = _mm512_sub_ps(x, _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0770672f), f, _mm512_set1_ps(0.2276448f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6951168f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, f, _mm512_set1_ps(1)), x); // by 2^floor(x)
}

// 16 rows of d channels, of which so many are there, to pairs of channels, `step` from one to the next.
INLINE void turn(const uint16_t *from, int64_t stride, int64_t rows, int64_t d, uint32_t *to, int64_t step) {
    for (int64_t c = 0; c < d; c += 32) {
        __m512i x[16];
        for (int i = 0; i < 16; i++) x[i] = _mm512_maskz_loadu_epi16(i < rows ? first(d - c) : 0, from + i * stride + c);
        transpose(x);
        for (int i = 0; i < 16 && c + 2 * i < d; i++) _mm512_store_si512(to + (c / 2 + i) * step, x[i]);
    }
}

static void turn_values(const uint16_t *from, int64_t stride, int64_t keys, int64_t d, int64_t width) {
    for (int64_t i = 0; i < keys; i += 2)
        for (int64_t c = 0; c < width; c += 16) {
            __m256i a = _mm256_maskz_loadu_epi16(first(d - c), from + i * stride + c);
            __m256i b = _mm256_maskz_loadu_epi16(i + 1 < keys ? first(d - c) : 0, from + (i + 1) * stride + c);
            __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
            _mm512_mask_storeu_epi32(own.v + i / 2 * width + c, first(width - c), both);
        }
}

// acc (TILE, R, 16) += x (count, R, 16) y (count, TILE), which are pairs; y's rows are `step` from one to the next.
INLINE void multiply(const int R, __m512 acc[TILE][ROWS], const uint32_t *x, const uint32_t *y, int64_t step, int64_t count) {
    for (int64_t p = 0; p < count; p++, x += R * 16, y += step) {
        __m512bh rows[ROWS];
        for (int r = 0; r < R; r++) rows[r] = (__m512bh)_mm512_load_si512(x + r * 16);
        for (int i = 0; i < TILE; i++)
            for (int r = 0; r < R; r++)
                acc[i][r] = _mm512_dpbf16_ps(acc[i][r], rows[r], (__m512bh)_mm512_set1_epi32(y[i]));
    }
}

// q k^T for the keys of a block, and the largest of each query, in own.top.
INLINE void make_scores(const int R, const uint32_t *q, int64_t keys, int64_t pairs) {
    __m512 top[ROWS];
    for (int r = 0; r < R; r++) top[r] = _mm512_load_ps(own.top + r * 16);
    for (int64_t j = 0; j < keys; j += TILE) {
        __m512 acc[TILE][ROWS];
        for (int i = 0; i < TILE; i++)
            for (int r = 0; r < R; r++) acc[i][r] = _mm512_setzero_ps();
        multiply(R, acc, q, own.k + j / 16 * 16 * pairs + j % 16, 16, pairs);
        for (int i = 0; i < TILE; i++)
            for (int r = 0; r < R; r++) {
                if (i < keys - j) top[r] = _mm512_max_ps(acc[i][r], top[r]); // NaN is passed over here, and stays a score
                _mm512_store_ps(own.scores + ((j + i) * R + r) * 16, i < keys - j ? acc[i][r] : _mm512_set1_ps(-__builtin_inff()));
            }
    }
    for (int r = 0; r < R; r++) _mm512_store_ps(own.top + r * 16, top[r]);
}

// Softmax does not change when as much is taken off all scores of a row.  Here that need not be the largest: weights up to 2^40
// are as exact.  So it is raised, and what has been added up made smaller, when it is that far behind: seldom after the first block.
INLINE void raise(const int R, float *out, float *most, float *sum, int64_t width, float scale) {
    for (int r = 0; r < R; r++) {
        __m512 old = _mm512_load_ps(most + r * 16), top = _mm512_load_ps(own.top + r * 16);
        __mmask16 far = _mm512_cmp_ps_mask(top, _mm512_add_ps(old, _mm512_set1_ps(40 / scale)), _CMP_GT_OQ);
        if (!far) continue;
        __m512 now = _mm512_mask_mov_ps(old, far, top);
        __m512 factor = power_of_2(_mm512_mul_ps(_mm512_sub_ps(old, now), _mm512_set1_ps(scale)));
        _mm512_store_ps(most + r * 16, now);
        _mm512_store_ps(sum + r * 16, _mm512_mul_ps(factor, _mm512_load_ps(sum + r * 16)));
        for (float *x = out + r * 16; x < out + width * R * 16; x += R * 16)
            _mm512_store_ps(x, _mm512_mul_ps(factor, _mm512_load_ps(x)));
    }
}

// 2^((score - most) * scale) in bfloat16, and their sum, of what is rounded.
INLINE void make_weights(const int R, const float *most, float *sum, int64_t pairs, float scale) {
    __m512 m[ROWS], l[ROWS];
    for (int r = 0; r < R; r++) m[r] = _mm512_load_ps(most + r * 16), l[r] = _mm512_load_ps(sum + r * 16);
    for (int64_t p = 0; p < pairs; p++)
        for (int r = 0; r < R; r++) {
            __m512 x[2];
            for (int i = 0; i < 2; i++) {
                x[i] = _mm512_sub_ps(_mm512_load_ps(own.scores + ((2 * p + i) * R + r) * 16), m[r]);
                x[i] = power_of_2(_mm512_mul_ps(x[i], _mm512_set1_ps(scale)));
            }
            __m512i both = paired(x[0], x[1]);
            l[r] = _mm512_dpbf16_ps(l[r], (__m512bh)both, (__m512bh)_mm512_set1_epi32(0x3f803f80)); // two ones
            _mm512_store_si512(own.weights + (p * R + r) * 16, both);
        }
    for (int r = 0; r < R; r++) _mm512_store_ps(sum + r * 16, l[r]);
}

INLINE void add_values(const int R, float *out, int64_t pairs, int64_t width) {
    for (int64_t c = 0; c < width; c += TILE, out += TILE * R * 16) {
        __m512 acc[TILE][ROWS];
        for (int i = 0; i < TILE; i++)
            for (int r = 0; r < R; r++) acc[i][r] = _mm512_load_ps(out + (i * R + r) * 16);
        multiply(R, acc, own.weights, own.v + c, width, pairs);
        for (int i = 0; i < TILE; i++)
            for (int r = 0; r < R; r++) _mm512_store_ps(out + (i * R + r) * 16, acc[i][r]);
    }
}

// R vectors of queries, from vector `at` of the task on, and a block of keys.
INLINE void attend(const int R, int64_t at, int64_t keys, int64_t pairs, int64_t width, float scale) {
    float *out = own.out + at * width * 16, *most = own.most + at * 16, *sum = own.sum + at * 16;
    memcpy(own.top, most, R * 16 * sizeof(float));
    make_scores(R, own.q + at * pairs * 16, keys, pairs);
    raise(R, out, most, sum, width, scale);
    make_weights(R, most, sum, (keys + 1) / 2, scale);
    add_values(R, out, (keys + 1) / 2, width);
}

static void attend_1(int64_t at, int64_t k, int64_t p, int64_t w, float s) { attend(1, at, k, p, w, s); }
static void attend_2(int64_t at, int64_t k, int64_t p, int64_t w, float s) { attend(ROWS, at, k, p, w, s); }

// Divides by the sums: R vectors of queries to so many rows of the result.
static void finish(int R, int r, int64_t at, uint16_t *to, int64_t stride, int64_t rows, int64_t d, int64_t width) {
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(own.sum + (at + r) * 16));
    const float *from = own.out + at * width * 16 + r * 16;
    for (int64_t c = 0; c < d; c += 32) {
        __m512i x[16];
        for (int i = 0; i < 16; i++) {
            const float *a = from + (c + 2 * i) * R * 16;
            x[i] = c + 2 * i >= d ? _mm512_setzero_si512()
                : paired(_mm512_mul_ps(_mm512_load_ps(a), share), _mm512_mul_ps(_mm512_load_ps(a + R * 16), share));
        }
        transpose(x);
        for (int i = 0; i < 16 && i < rows; i++) _mm512_mask_storeu_epi16(to + i * stride + c, first(d - c), x[i]);
    }
}

// The vectors of queries from one to another of a head.
static void task(const Job *job, int64_t picture, int64_t head, int64_t from, int64_t to) {
    const int64_t d = job->d, pairs = (d + 1) / 2, width = (d + TILE - 1) / TILE * TILE, n = to - from, stride = job->heads * d;
    const float scale = 1.44269504f / __builtin_sqrtf(d); // log2(e) / sqrt(d)
    const uint16_t *q = job->q + picture * job->q_batch + head * d;
    for (int64_t i = 0; i < n; i++) { // in ROWS beside each other, the last perhaps alone
        int64_t at = i / ROWS * ROWS, R = n - at < ROWS ? n - at : ROWS, row = (from + i) * 16;
        turn(q + row * job->q_row, job->q_row, job->length - row, d, own.q + (at * pairs + i % ROWS) * 16, R * 16);
    }
    memset(own.out, 0, n * width * 16 * sizeof(float));
    for (int64_t i = 0; i < n * 16; i++) own.most[i] = -1e38f, own.sum[i] = 0;
    for (int64_t j = 0; j < job->keys; j += KEYS) {
        const int64_t keys = job->keys - j < KEYS ? job->keys - j : KEYS;
        const uint16_t *k = job->k + picture * job->k_batch + head * d + j * job->k_row;
        for (int64_t i = 0; i < keys; i += 16) turn(k + i * job->k_row, job->k_row, keys - i, d, own.k + i * pairs, 16);
        turn_values(job->v + picture * job->v_batch + head * d + j * job->v_row, job->v_row, keys, d, width);
        for (int64_t at = 0; at < n; at += ROWS) (n - at < ROWS ? attend_1 : attend_2)(at, keys, pairs, width, scale);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t at = i / ROWS * ROWS, R = n - at < ROWS ? n - at : ROWS, row = (from + i) * 16;
        uint16_t *out = job->out + (picture * job->length + row) * stride + head * d;
        finish(R, i % ROWS, at, out, stride, job->length - row, d, width);
    }
}

// What each thread does: a row's numbers are the same in whatever task it is.
static void work(void *given) {
    Job *job = given;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); // numbers below 2^-126 are zero, as the products take them anyway: some processors are slow with them
    const int64_t vectors = (job->length + 15) / 16, all = job->batch * job->heads * job->parts;
    for (int64_t i; (i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < all;) {
        int64_t part = i % job->parts, head = i / job->parts;
        task(job, head / job->heads, head % job->heads, vectors * part / job->parts, vectors * (part + 1) / job->parts);
    }
    _mm_setcsr(before);
}

// parallel: GOMP_parallel of the OpenMP that the caller's own threads are of, or none.
void attention(Job *job, unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    const int64_t vectors = (job->length + 15) / 16, width = (job->d + TILE - 1) / TILE * TILE, heads = job->batch * job->heads;
    const int64_t held = HELD / 16 / width < LONGEST ? HELD / 16 / width : LONGEST;
    job->parts = (vectors + held - 1) / held;
    while (heads * job->parts < 4 * threads && vectors >= 8 * job->parts) job->parts *= 2; // for all threads to have some
    job->next = 0;
    if (parallel && threads > 1) parallel(work, job, threads, 0);
    else work(job);
}
