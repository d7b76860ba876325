/* The loops of opd_store that numpy needs many passes for. `kernels.py` says what they promise.

   The numpy code is the reference: a function here either does what that does, bit for bit, or reports that
   it did not, and then numpy decides and words the error. So there is no error text about data in this file.

   Nothing is trusted. Sizes and indices are compared before use, and what they are compared in is memory of
   this module or of an immutable bytes object, since a page may be a mapped file that somebody changes
   meanwhile.

   P = positions, k = ranks of a page, n = entries of a page without padding. Streams: spec/encodings.md. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#define ESCAPE 255
#define NO_ID 0xFFFFFFFFu
#define MAX_PLANES 4
#define MAX_RANK 65535
#define MAX_GROUPS 16
#define SIGN 0x80000000u
#define LIST_STRIDE 256
#define BYTES(byte) (0x0101010101010101u * (uint64_t)(byte))

/* Built a second time for processors with AVX2, and chosen when the module is loaded. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define MANY_LANES __attribute__((target_clones("avx2", "default")))
#else
#define MANY_LANES
#endif

static const union {
    uint16_t number;
    uint8_t bytes[2];
} one = {1};
#define IS_LITTLE_ENDIAN (one.bytes[0] == 1)

/* Hot loops stay functions of their own, whose few variables fit the registers. */
#if defined(__GNUC__)
#define NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define NOINLINE __declspec(noinline)
#else
#define NOINLINE
#endif

/* FAILED: a Python error is set. ODD: not what this module takes; the reference has to look. */
enum { FAILED = -1, ODD = 0, OK = 1 };

/* ---- Arrays of the caller ---- */

typedef struct {
    Py_buffer buffer;
    int is_held;
    char *data;
    Py_ssize_t n_rows, width, stride, item;
} Rows;

static void release(Rows *rows) {
    if (rows->is_held) PyBuffer_Release(&rows->buffer);
    rows->is_held = 0;
}

/* [n] or [n, width] of items of a size; rows may be apart, items of a row not. None leaves `data` NULL. */
static int take_rows(PyObject *object, Rows *rows, int writable, Py_ssize_t item, const char *name) {
    memset(rows, 0, sizeof *rows);
    if (object == Py_None) return OK;
    Py_buffer *b = &rows->buffer;
    if (PyObject_GetBuffer(object, b, PyBUF_STRIDED_RO | (writable ? PyBUF_WRITABLE : 0)) < 0) {
        if (PyErr_ExceptionMatches(PyExc_BufferError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: an array that cannot be used", name);
        }
        return FAILED;
    }
    rows->is_held = 1;
    if (b->itemsize < 1) {
        PyErr_Format(PyExc_ValueError, "%s: items without bytes", name);
        return FAILED;
    }
    int is_flat = b->ndim == 1;
    if (!is_flat && b->ndim != 2) {
        PyErr_Format(PyExc_ValueError, "%s: expected one or two dimensions, found %d", name, b->ndim);
        return FAILED;
    }
    rows->data = b->buf;
    rows->item = b->itemsize;
    rows->n_rows = b->shape[0];
    rows->width = is_flat ? 1 : b->shape[1];
    rows->stride = b->strides[0];
    int is_joined = is_flat || rows->width <= 1 || b->strides[1] == b->itemsize;
    int is_aligned = (uintptr_t)b->buf % (size_t)b->itemsize == 0 &&
                     (rows->n_rows <= 1 || rows->stride % b->itemsize == 0);
    if ((item && b->itemsize != item) || !is_joined || !is_aligned) {
        PyErr_Format(PyExc_ValueError, "%s: items of %zd bytes, apart or not aligned", name, b->itemsize);
        return FAILED;
    }
    return OK;
}

static int require_shape(const Rows *rows, Py_ssize_t n_rows, Py_ssize_t width, const char *name) {
    if (rows->data == NULL || (rows->n_rows == n_rows && rows->width == width)) return OK;
    PyErr_Format(PyExc_ValueError, "%s: expected [%zd, %zd], found [%zd, %zd]", name, n_rows, width,
                 rows->n_rows, rows->width);
    return FAILED;
}

static inline void *row_at(const Rows *rows, Py_ssize_t at) { return rows->data + at * rows->stride; }

/* A flat array without gaps, such as a table. */
static int take_flat(PyObject *object, Rows *rows, Py_ssize_t item, const char *name) {
    if (take_rows(object, rows, 0, item, name) < 0) return FAILED;
    if (rows->data == NULL || (rows->buffer.ndim == 1 && (rows->n_rows <= 1 || rows->stride == item)))
        return OK;
    PyErr_Format(PyExc_ValueError, "%s: expected one dimension without gaps", name);
    return FAILED;
}

/* ---- Streams of a page ---- */

typedef struct {
    const uint8_t *body;
    Py_ssize_t size, at;
    PyObject *view, *decompress;
    uint64_t max_window;
} Reader;

typedef struct {
    Py_ssize_t n;
    int n_planes;
    const uint8_t *planes[MAX_PLANES];
    PyObject *held[MAX_PLANES];
    uint8_t *copies[MAX_PLANES];
    uint32_t *words;
} Stream;

static void drop(Stream *s) {
    for (int i = 0; i < MAX_PLANES; i++) {
        Py_CLEAR(s->held[i]);
        free(s->copies[i]);
    }
    free(s->words);
}

/* Each byte is loaded once: what was compared is what is used. */
static inline uint32_t u32_at(const volatile uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Whether a zstd frame says that it holds `n` bytes, in a small window, without dictionary and checksum. */
static int frame_fits(const uint8_t *frame, Py_ssize_t size, uint64_t n, uint64_t max_window) {
    if (size < 6 || u32_at(frame) != 0xFD2FB528u || n == 0) return 0;
    int about = frame[4], is_single = about >> 5 & 1, size_code = about >> 6;
    if (about & 0x0F) return 0; /* reserved bit, checksum, dictionary */
    const uint8_t *next = frame + 5;
    uint64_t window = n;
    if (!is_single) {
        uint64_t base = (uint64_t)1 << (10 + (*next >> 3));
        window = base + base / 8 * (*next & 7);
        next++;
    }
    int n_bytes = size_code ? 1 << size_code : is_single;
    if (n_bytes == 0 || size - (next - frame) < n_bytes) return 0;
    uint64_t found = size_code == 1 ? 256 : 0;
    for (int i = 0; i < n_bytes; i++) found += (uint64_t)next[i] << 8 * i;
    return found == n && window <= max_window;
}

static int take_plane(Reader *r, Stream *s, int number) {
    if (r->size - r->at < 4) return ODD;
    uint32_t word = u32_at(r->body + r->at);
    Py_ssize_t size = word & 0x7FFFFFFF, start = r->at + 4;
    if (size > r->size - start) return ODD;
    r->at = start + size;
    if (!(word >> 31)) {
        if (size != s->n) return ODD;
        uint8_t *copy = malloc(size ? size : 1);
        if (copy == NULL) return PyErr_NoMemory(), FAILED;
        memcpy(copy, r->body + start, size);
        s->planes[number] = s->copies[number] = copy;
        return OK;
    }
    if (!frame_fits(r->body + start, size, s->n, r->max_window)) return ODD;
    PyObject *frame = PySequence_GetSlice(r->view, start, r->at);
    if (frame == NULL) return FAILED;
    PyObject *found = s->held[number] = PyObject_CallFunctionObjArgs(r->decompress, frame, NULL);
    Py_DECREF(frame);
    if (found == NULL) return FAILED;
    if (!PyBytes_Check(found) || PyBytes_Size(found) != s->n) return ODD;
    s->planes[number] = (const uint8_t *)PyBytes_AsString(found);
    return OK;
}

static int take_stream(Reader *r, Stream *s, Py_ssize_t n) {
    if (r->at == r->size) return ODD;
    s->n = n;
    s->n_planes = *(const volatile uint8_t *)(r->body + r->at++);
    if (s->n_planes > MAX_PLANES) return ODD;
    for (int i = 0; i < s->n_planes; i++) {
        int status = take_plane(r, s, i);
        if (status != OK) return status;
    }
    return OK;
}

/* Put the planes together as `words`; ODD where one is above the limit. Needs no GIL. */
static int join(Stream *s, uint32_t limit) {
    Py_ssize_t n = s->n;
    uint32_t *restrict out = s->words = malloc(n ? 4 * n : 1);
    if (out == NULL) return FAILED;
    const uint8_t *restrict a = s->planes[0], *restrict b = s->planes[1];
    const uint8_t *restrict c = s->planes[2], *restrict d = s->planes[3];
    switch (s->n_planes) {
    case 0: memset(out, 0, 4 * n); break;
    case 1: for (Py_ssize_t i = 0; i < n; i++) out[i] = a[i]; break;
    case 2: for (Py_ssize_t i = 0; i < n; i++) out[i] = a[i] | (uint32_t)b[i] << 8; break;
    case 3:
        for (Py_ssize_t i = 0; i < n; i++) out[i] = a[i] | (uint32_t)b[i] << 8 | (uint32_t)c[i] << 16;
        break;
    default:
        for (Py_ssize_t i = 0; i < n; i++)
            out[i] = a[i] | (uint32_t)b[i] << 8 | (uint32_t)c[i] << 16 | (uint32_t)d[i] << 24;
    }
    if (limit >= ((uint64_t)1 << 8 * s->n_planes) - 1) return OK;
    int is_above = 0;
    for (Py_ssize_t i = 0; i < n; i++) is_above |= out[i] > limit;
    return is_above ? ODD : OK;
}

/* The stream as its lowest plane; ODD where a value needs more. */
static int narrow(Stream *s) {
    if (s->n_planes == 0) {
        s->planes[0] = s->copies[0] = calloc(s->n ? s->n : 1, 1);
        if (s->planes[0] == NULL) return PyErr_NoMemory(), FAILED;
    }
    uint8_t any = 0;
    for (int plane = 1; plane < s->n_planes; plane++)
        for (Py_ssize_t i = 0; i < s->n; i++) any |= s->planes[plane][i];
    return any ? ODD : OK;
}

/* The highest bit of each byte that is 255. */
static inline uint64_t escapes_of(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    return ((word & BYTES(0x7F)) + BYTES(1)) & word & BYTES(0x80);
}

NOINLINE static Py_ssize_t count_escapes(const Stream *s) {
    const uint8_t *values = s->planes[0];
    Py_ssize_t total = 0, i = 0;
    for (; i + 8 <= s->n; i += 8) total += (escapes_of(values + i) >> 7) * BYTES(1) >> 56;
    for (; i < s->n; i++) total += values[i] == ESCAPE;
    return total;
}

/* ---- A page ---- */

enum { BY_ID, BY_FREQUENCY, BY_LIST };

typedef struct {
    Py_ssize_t first, last; /* columns of the page */
    Stream steps, more;
} Group;

typedef struct {
    Py_ssize_t n_rows, n_ranks, rank_start, rank_end, n_entries;
    uint32_t limit;
    int is_words, scale;
    int n_groups, mode;
    const uint32_t *counts; /* NULL: all rows are full */
    Stream lengths, tail, heads, kind_of_ids, ids, lists, escaped, draws;
    Group groups[MAX_GROUPS];
    const uint32_t *by_rank, *table; /* [n_ids], [n_lists * 256] */
    Py_ssize_t n_ids, n_lists;
    Rows out_ids, out_logprob, out_tail, out_draws;
    uint32_t *line; /* [k] units or words of one row */
} Page;

static inline Py_ssize_t entries_of(const Page *page, Py_ssize_t row, Py_ssize_t first, Py_ssize_t last) {
    if (page->counts == NULL) return last - first;
    Py_ssize_t n = page->counts[row];
    return (n < first ? first : n > last ? last : n) - first;
}

static Py_ssize_t all_entries(const Page *page, Py_ssize_t first, Py_ssize_t last) {
    if (page->counts == NULL) return page->n_rows * (last - first);
    Py_ssize_t total = 0;
    for (Py_ssize_t row = 0; row < page->n_rows; row++) total += entries_of(page, row, first, last);
    return total;
}

/* Ranks after the first, cut at 8, 16, 32, ... counted over the whole support. */
static void find_groups(Page *page) {
    Py_ssize_t start = page->rank_start + 1;
    for (Py_ssize_t cut = 8; start < page->rank_end; cut *= 2) {
        if (cut <= start) continue;
        Py_ssize_t end = cut < page->rank_end ? cut : page->rank_end;
        Group *group = &page->groups[page->n_groups++];
        group->first = start - page->rank_start;
        group->last = end - page->rank_start;
        start = end;
    }
}

#define TRY(call) \
    do { \
        int status_ = (call); \
        if (status_ != OK) return status_; \
    } while (0)

static int take_ids(Reader *r, Page *page) {
    TRY(take_stream(r, &page->kind_of_ids, 1));
    TRY(narrow(&page->kind_of_ids));
    page->mode = page->kind_of_ids.planes[0][0];
    if (page->mode > BY_LIST || (page->mode != BY_ID && page->by_rank == NULL)) return ODD;
    if (page->mode != BY_LIST) return take_stream(r, &page->ids, page->n_entries);
    if (page->n_lists == 0) return ODD;
    TRY(take_stream(r, &page->lists, page->n_rows));
    TRY(take_stream(r, &page->ids, page->n_entries));
    TRY(narrow(&page->ids));
    return take_stream(r, &page->escaped, count_escapes(&page->ids));
}

/* Take every stream. Decompression is a call of Python's, so this part keeps the GIL. */
static int take_page(Reader *r, Page *page, int is_ragged, int has_draws) {
    Py_ssize_t n_heads = page->n_rows;
    if (is_ragged) {
        TRY(take_stream(r, &page->lengths, page->n_rows));
        TRY(join(&page->lengths, (uint32_t)page->n_ranks));
        page->counts = page->lengths.words;
        n_heads = all_entries(page, 0, 1);
    }
    page->n_entries = all_entries(page, 0, page->n_ranks);
    TRY(take_stream(r, &page->tail, page->n_rows));
    TRY(take_stream(r, &page->heads, n_heads));
    for (int i = 0; i < page->n_groups; i++) {
        Group *group = &page->groups[i];
        TRY(take_stream(r, &group->steps, all_entries(page, group->first, group->last)));
        if (page->is_words) continue;
        TRY(narrow(&group->steps));
        TRY(take_stream(r, &group->more, count_escapes(&group->steps)));
    }
    TRY(take_ids(r, page));
    if (has_draws) TRY(take_stream(r, &page->draws, page->n_entries));
    return r->at == r->size ? OK : ODD;
}

/* ---- Putting a page together: without the GIL ---- */

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Taken from zero, so that no units give 0.0 and not -0.0. The product is exact. */
static inline float from_units(uint32_t units, int is_half, float unit) {
    if (!is_half) return 0.0f - (float)(int32_t)units * unit;
    /* A float16; small ones by arithmetic, as a thread may flush subnormals to zero. */
    float normal = from_bits((units << 13) + 0x38000000u), small = (float)(int32_t)units * 0x1p-24f;
    return 0.0f - (units < 0x400 ? small : normal);
}

/* Add up one rank group of a row from `units` on. */
static inline uint32_t add_steps(uint32_t units, const uint8_t *restrict steps, Py_ssize_t n,
                                 const uint32_t **more, uint32_t limit, uint32_t *restrict line) {
    Py_ssize_t i = 0;
    while (i < n) {
        Py_ssize_t end = i + 8;
        if (end <= n && !escapes_of(steps + i)) {
            for (int j = 0; j < 8; j++) line[i + j] = units += steps[i + j];
            i = end;
            continue;
        }
        for (end = end < n ? end : n; i < end; i++) {
            units += steps[i];
            if (steps[i] == ESCAPE) {
                units += *(*more)++;
                if (units > limit) return units; /* before another one is added */
            }
            line[i] = units;
        }
    }
    return units;
}

NOINLINE static void put_ladder(const uint32_t *restrict line, Py_ssize_t n, float unit,
                                float *restrict out) {
    for (Py_ssize_t i = 0; i < n; i++) out[i] = from_units(line[i], 0, unit);
}

NOINLINE static void put_halves(const uint32_t *restrict line, Py_ssize_t n, float *restrict out) {
    for (Py_ssize_t i = 0; i < n; i++) out[i] = from_units(line[i], 1, 0);
}

NOINLINE static int ladder_rows(const Page *page, float unit) {
    const uint32_t *head = page->heads.words, *more[MAX_GROUPS];
    const uint8_t *steps[MAX_GROUPS];
    for (int g = 0; g < page->n_groups; g++) {
        steps[g] = page->groups[g].steps.planes[0];
        more[g] = page->groups[g].more.words;
    }
    uint32_t limit = page->limit, *line = page->line;
    for (Py_ssize_t row = 0; row < page->n_rows; row++) {
        Py_ssize_t n_entries = entries_of(page, row, 0, page->n_ranks);
        if (n_entries == 0) continue;
        uint32_t units = line[0] = *head++;
        for (int g = 0; g < page->n_groups; g++) {
            const Group *group = &page->groups[g];
            Py_ssize_t n = entries_of(page, row, group->first, group->last);
            units = add_steps(units, steps[g], n, &more[g], limit, line + group->first);
            if (units > limit) return ODD;
            steps[g] += n;
        }
        if (unit > 0) put_ladder(line, n_entries, unit, row_at(&page->out_logprob, row));
        else put_halves(line, n_entries, row_at(&page->out_logprob, row));
    }
    return OK;
}

NOINLINE static void words_rows(const Page *page) {
    const uint32_t *head = page->heads.words, *steps[MAX_GROUPS];
    for (int g = 0; g < page->n_groups; g++) steps[g] = page->groups[g].steps.words;
    for (Py_ssize_t row = 0; row < page->n_rows; row++) {
        uint32_t *restrict out = row_at(&page->out_logprob, row);
        if (entries_of(page, row, 0, 1) == 0) continue;
        uint32_t word = *head++;
        out[0] = word ^ SIGN;
        for (int g = 0; g < page->n_groups; g++) {
            const uint32_t *restrict from = steps[g];
            Py_ssize_t first = page->groups[g].first, n = entries_of(page, row, first, page->groups[g].last);
            for (Py_ssize_t i = 0; i < n; i++) out[first + i] = (word += from[i]) ^ SIGN;
            steps[g] += n;
        }
    }
}

static int put_logprobs(Page *page) {
    int is_half = !page->is_words && page->scale == 0;
    float unit = page->scale ? 1.0f / (float)page->scale : 0.0f;
    TRY(join(&page->tail, page->is_words ? NO_ID : page->limit + 1));
    TRY(join(&page->heads, page->limit));
    const uint32_t *tail = page->tail.words;
    for (Py_ssize_t row = 0; page->out_tail.data && row < page->n_rows; row++) {
        float value = page->is_words   ? from_bits(tail[row] ^ SIGN)
                      : tail[row] == 0 ? -INFINITY
                                       : from_units(tail[row] - 1, is_half, unit);
        memcpy(row_at(&page->out_tail, row), &value, 4);
    }
    for (int g = 0; g < page->n_groups; g++) {
        if (page->is_words) TRY(join(&page->groups[g].steps, NO_ID));
        else TRY(join(&page->groups[g].more, page->limit - ESCAPE));
    }
    if (!page->is_words) return ladder_rows(page, unit);
    words_rows(page);
    return OK;
}

static inline int lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
    return __builtin_ctzll(bits);
#else
    int at = 0;
    for (; !(bits & 1); bits >>= 1) at++;
    return at;
#endif
}

/* Ids of one row by its list; codes of 255 take the next of `escaped`. No branch depends on a single code. */
static inline const uint32_t *put_listed(const uint8_t *restrict codes, Py_ssize_t n,
                                         const uint32_t *restrict list, const uint32_t *restrict by_rank,
                                         const uint32_t *restrict escaped, uint32_t *restrict out) {
    for (Py_ssize_t i = 0; i < n; i++) out[i] = list[codes[i]];
    for (Py_ssize_t start = 0; start < n; start += 64) {
        Py_ssize_t end = start + 64 < n ? start + 64 : n, i = start;
        uint64_t bits = 0;
        /* The product brings the lowest bits of eight bytes together, the first byte's lowest. */
        for (; IS_LITTLE_ENDIAN && i + 8 <= end; i += 8)
            bits |= ((escapes_of(codes + i) >> 7) * 0x0102040810204080u >> 56) << (i - start);
        for (; i < end; i++) bits |= (uint64_t)(codes[i] == ESCAPE) << (i - start);
        for (; bits; bits &= bits - 1) out[start + lowest_bit(bits)] = by_rank[*escaped++];
    }
    return escaped;
}

NOINLINE static void listed_rows(const Page *page) {
    const uint8_t *codes = page->ids.planes[0];
    const uint32_t *escaped = page->escaped.words;
    for (Py_ssize_t row = 0; row < page->n_rows; row++) {
        Py_ssize_t n = entries_of(page, row, 0, page->n_ranks);
        const uint32_t *list = page->table + (size_t)page->lists.words[row] * LIST_STRIDE;
        escaped = put_listed(codes, n, list, page->by_rank, escaped, row_at(&page->out_ids, row));
        codes += n;
    }
}

static int put_ids(Page *page) {
    uint32_t last = page->mode == BY_ID ? NO_ID - 1 : (uint32_t)page->n_ids - 1;
    if (page->mode == BY_LIST) {
        TRY(join(&page->lists, (uint32_t)page->n_lists - 1));
        TRY(join(&page->escaped, last));
        listed_rows(page);
        return OK;
    }
    TRY(join(&page->ids, last));
    const uint32_t *restrict words = page->ids.words, *restrict by_rank = page->by_rank;
    for (Py_ssize_t row = 0; row < page->n_rows; row++) {
        Py_ssize_t n = entries_of(page, row, 0, page->n_ranks);
        uint32_t *restrict out = row_at(&page->out_ids, row);
        if (page->mode == BY_ID) memcpy(out, words, 4 * n);
        else for (Py_ssize_t i = 0; i < n; i++) out[i] = by_rank[words[i]];
        words += n;
    }
    return OK;
}

static int put_draws(Page *page) {
    if (page->out_draws.data == NULL) return OK;
    TRY(join(&page->draws, NO_ID));
    const uint32_t *words = page->draws.words;
    for (Py_ssize_t row = 0; row < page->n_rows; row++) {
        Py_ssize_t n = entries_of(page, row, 0, page->n_ranks);
        memcpy(row_at(&page->out_draws, row), words, 4 * n);
        words += n;
    }
    return OK;
}

static void put_padding(Page *page) {
    for (Py_ssize_t row = 0; page->counts && row < page->n_rows; row++) {
        for (Py_ssize_t i = page->counts[row]; i < page->n_ranks; i++) {
            ((float *)row_at(&page->out_logprob, row))[i] = -INFINITY;
            ((uint32_t *)row_at(&page->out_ids, row))[i] = NO_ID;
            if (page->out_draws.data) ((uint32_t *)row_at(&page->out_draws, row))[i] = 0;
        }
    }
}

static int put_page(Page *page) {
    TRY(put_logprobs(page));
    TRY(put_ids(page));
    TRY(put_draws(page));
    put_padding(page);
    return OK;
}

static void drop_page(Page *page) {
    Stream *streams[] = {&page->lengths, &page->tail,    &page->heads,  &page->kind_of_ids,
                         &page->ids,     &page->lists, &page->escaped, &page->draws};
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++) drop(streams[i]);
    for (int i = 0; i < page->n_groups; i++) drop(&page->groups[i].steps), drop(&page->groups[i].more);
    release(&page->out_ids), release(&page->out_logprob), release(&page->out_tail), release(&page->out_draws);
    free(page->line);
}

static int check_arguments(Page *page, const Rows *by_rank, const Rows *table, int has_draws) {
    if (page->rank_start < 0 || page->rank_end <= page->rank_start || page->rank_end > MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "ranks [%zd, %zd)", page->rank_start, page->rank_end);
        return FAILED;
    }
    /* The scale decides how far sums may go: float32 has to hold them, or float16. */
    uint32_t largest = page->is_words ? NO_ID : page->scale ? (1u << 24) - 1 : 0x7BFF;
    if (page->scale < 0 || page->limit > largest || page->limit < ESCAPE) {
        PyErr_Format(PyExc_ValueError, "limit %u at scale %d", page->limit, page->scale);
        return FAILED;
    }
    if (page->out_ids.data == NULL || page->out_logprob.data == NULL ||
        (page->out_draws.data && !has_draws)) {
        PyErr_SetString(PyExc_ValueError, "ids and logprob are needed, and draws only where there are some");
        return FAILED;
    }
    page->n_rows = page->out_ids.n_rows;
    page->n_ranks = page->rank_end - page->rank_start;
    /* More than memory has, but with strides of 0; no size below is more than 4 bytes an entry. */
    if (page->n_rows > PY_SSIZE_T_MAX / 4 / page->n_ranks) {
        PyErr_Format(PyExc_ValueError, "%zd rows", page->n_rows);
        return FAILED;
    }
    if (require_shape(&page->out_ids, page->n_rows, page->n_ranks, "ids") < 0 ||
        require_shape(&page->out_logprob, page->n_rows, page->n_ranks, "logprob") < 0 ||
        require_shape(&page->out_tail, page->n_rows, 1, "log_tail") < 0 ||
        require_shape(&page->out_draws, page->n_rows, page->n_ranks, "draws") < 0)
        return FAILED;
    page->by_rank = (const uint32_t *)by_rank->data;
    page->n_ids = by_rank->n_rows;
    page->table = (const uint32_t *)table->data;
    page->n_lists = table->n_rows / LIST_STRIDE;
    if (table->n_rows % LIST_STRIDE || (page->by_rank && (page->n_ids < 1 || page->n_ids >= NO_ID))) {
        PyErr_Format(PyExc_ValueError, "an id table of %zd ids and %zd codes", page->n_ids, table->n_rows);
        return FAILED;
    }
    return OK;
}

static PyObject *result_of(int status) {
    if (status != FAILED) return PyBool_FromLong(status == OK);
    return PyErr_Occurred() ? NULL : PyErr_NoMemory();
}

static PyObject *decode_streams(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *body, *decompress, *by_rank_o, *table_o, *ids_o, *logprob_o, *tail_o, *draws_o;
    unsigned long long max_window;
    unsigned int limit;
    int is_ragged, has_draws;
    Page page;
    memset(&page, 0, sizeof page);
    if (!PyArg_ParseTuple(args, "OOKnnppipIOOOOOO", &body, &decompress, &max_window, &page.rank_start,
                          &page.rank_end, &is_ragged, &has_draws, &page.scale, &page.is_words, &limit,
                          &by_rank_o, &table_o, &ids_o, &logprob_o, &tail_o, &draws_o))
        return NULL;
    page.limit = limit;
    Rows bytes = {0}, by_rank = {0}, table = {0};
    Reader reader = {.decompress = decompress, .max_window = max_window};
    int status = FAILED;
    if (take_flat(body, &bytes, 1, "body") < 0 || take_flat(by_rank_o, &by_rank, 4, "by_rank") < 0 ||
        take_flat(table_o, &table, 4, "lists") < 0 || take_rows(ids_o, &page.out_ids, 1, 4, "ids") < 0 ||
        take_rows(logprob_o, &page.out_logprob, 1, 4, "logprob") < 0 ||
        take_rows(tail_o, &page.out_tail, 1, 4, "log_tail") < 0 ||
        take_rows(draws_o, &page.out_draws, 1, 4, "draws") < 0 ||
        check_arguments(&page, &by_rank, &table, has_draws) < 0)
        goto done;
    reader.body = (const uint8_t *)bytes.data;
    reader.size = bytes.n_rows;
    reader.view = PyMemoryView_FromObject(body);
    page.line = malloc(4 * page.n_ranks);
    if (reader.view == NULL || page.line == NULL) goto done;
    find_groups(&page);
    status = take_page(&reader, &page, is_ragged, has_draws);
    if (status == OK) {
        Py_BEGIN_ALLOW_THREADS
        status = put_page(&page);
        Py_END_ALLOW_THREADS
    }
done:
    drop_page(&page);
    release(&bytes), release(&by_rank), release(&table);
    Py_XDECREF(reader.view);
    return result_of(status);
}

/* ---- Which rows are certainly possible ---- */

#define SUM_MARGIN 1e-5 /* ten times what 4,097 terms of exp_below() and their sum in parts can be off */
#define CHUNK 64
#define BITS_OF_87 0x42AE0000

/* exp(x) for x <= 0, 4e-7 of it too much or too little and |x| 2^-23 more; exp(-87) for anything lower, also
   -inf. 2^n times a polynomial for 2^f, f in [-0.5, 0.5]: Taylor's, whose next term is below 2e-7 there. */
static inline float exp_below(float x) {
    /* Compared as integers, since compilers that keep floating point traps would make no vectors of it. */
    int32_t size;
    memcpy(&size, &x, 4);
    size &= 0x7FFFFFFF;
    size = size < BITS_OF_87 ? size : BITS_OF_87;
    float scaled = from_bits(size) * -1.44269504f;
    int32_t n = (int32_t)(scaled - 0.5f);
    float f = scaled - (float)n;
    float power = 1.54035304e-4f;
    power = power * f + 1.33335581e-3f;
    power = power * f + 9.61812911e-3f;
    power = power * f + 5.55041087e-2f;
    power = power * f + 2.40226507e-1f;
    power = power * f + 6.93147181e-1f;
    power = power * f + 1.0f;
    return power * from_bits((uint32_t)(n + 127) << 23);
}

MANY_LANES static double sum_of_exp(const float *restrict values, Py_ssize_t n) {
    double total = 0;
    for (Py_ssize_t start = 0; start < n; start += CHUNK) {
        float terms[CHUNK], lanes[8] = {0};
        Py_ssize_t size = n - start < CHUNK ? n - start : CHUNK;
        for (Py_ssize_t i = 0; i < size; i++) terms[i] = exp_below(values[start + i]);
        for (; size % 8; size++) terms[size] = 0;
        for (Py_ssize_t i = 0; i < size; i += 8)
            for (int lane = 0; lane < 8; lane++) lanes[lane] += terms[i + lane];
        for (int half = 4; half; half /= 2)
            for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
        total += lanes[0];
    }
    return total;
}

typedef struct {
    uint32_t vocab_size;
    int is_ragged, may_be_empty;
    double limit;
    uint8_t *stamps; /* [vocab_size] number of the last row, modulo 255, that had the id */
} Rules;

static int padding_fits(const uint32_t *ids, const float *logprob, const uint32_t *draws, Py_ssize_t from,
                        Py_ssize_t to) {
    int bad = 0;
    for (Py_ssize_t i = from; i < to; i++)
        bad |= (ids[i] != NO_ID) | (logprob[i] != -INFINITY) | (draws != NULL && draws[i] != 0);
    return !bad;
}

/* Copies the ids to `own`, since the array may be a mapped file: what was compared is what is used. */
static inline int row_fits(const uint32_t *restrict ids, const float *restrict logprob,
                           const uint32_t *restrict draws, float tail, Py_ssize_t k, uint8_t stamp,
                           const Rules *rules, uint32_t *restrict own) {
    Py_ssize_t n = k;
    while (n > 0 && ids[n - 1] == NO_ID) n--;
    if (n < k && !(rules->is_ragged && padding_fits(ids, logprob, draws, n, k))) return 0;
    if (n == 0) return rules->may_be_empty && tail <= 0;
    /* In falling order, what is between two finite numbers is one; NaN is in no order. */
    if (!(tail <= 0) || !(logprob[0] <= 0) || !(logprob[n - 1] > -INFINITY)) return 0;
    /* The highest bit tells whether an id, or how far it is below the last one, is negative. */
    uint32_t top = 0;
    uint32_t is_ordered = 1;
    for (Py_ssize_t i = 0; i < n; i++) {
        own[i] = ids[i];
        top |= own[i] | (rules->vocab_size - 1 - own[i]);
    }
    for (Py_ssize_t i = 1; i < n; i++)
        is_ordered &= (logprob[i] < logprob[i - 1]) |
                      ((logprob[i] == logprob[i - 1]) & ((int32_t)own[i] > (int32_t)own[i - 1]));
    if (top >> 31 || !is_ordered) return 0;
    int bad = 0;
    for (Py_ssize_t i = 0; draws && i < n; i++) bad |= draws[i] == 0;
    uint8_t *restrict stamps = rules->stamps;
    for (Py_ssize_t i = 0; i < n; i++) {
        bad |= stamps[own[i]] == stamp;
        stamps[own[i]] = stamp;
    }
    double sum = sum_of_exp(logprob, n) + exp_below(tail);
    return !bad && sum * (1 + SUM_MARGIN) <= rules->limit;
}

MANY_LANES static int rows_fit(const Rows *ids, const Rows *logprob, const Rows *tail, const Rows *draws,
                               const Rules *rules, uint32_t *own) {
    int stamp = 0;
    for (Py_ssize_t row = 0; row < ids->n_rows; row++) {
        if (stamp++ == 255) {
            memset(rules->stamps, 0, rules->vocab_size);
            stamp = 1;
        }
        const uint32_t *row_draws = draws->data ? row_at(draws, row) : NULL;
        if (!row_fits(row_at(ids, row), row_at(logprob, row), row_draws, *(const float *)row_at(tail, row),
                      ids->width, (uint8_t)stamp, rules, own))
            return ODD;
    }
    return OK;
}

static PyObject *rows_are_fine(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *ids_o, *logprob_o, *tail_o, *draws_o;
    unsigned int vocab_size;
    Rules rules = {0};
    if (!PyArg_ParseTuple(args, "OOOOIppd", &ids_o, &logprob_o, &tail_o, &draws_o, &vocab_size,
                          &rules.is_ragged, &rules.may_be_empty, &rules.limit))
        return NULL;
    rules.vocab_size = vocab_size;
    uint32_t *own = NULL;
    Rows ids = {0}, logprob = {0}, tail = {0}, draws = {0};
    int status = FAILED;
    if (take_rows(ids_o, &ids, 0, 4, "ids") < 0 || take_rows(logprob_o, &logprob, 0, 4, "logprob") < 0 ||
        take_rows(tail_o, &tail, 0, 4, "log_tail") < 0 || take_rows(draws_o, &draws, 0, 4, "draws") < 0)
        goto done;
    if (ids.data == NULL || logprob.data == NULL || tail.data == NULL || vocab_size < 1 || vocab_size >> 31) {
        PyErr_SetString(PyExc_ValueError, "ids, logprob, log_tail and a vocabulary are needed");
        goto done;
    }
    if (require_shape(&logprob, ids.n_rows, ids.width, "logprob") < 0 ||
        require_shape(&tail, ids.n_rows, 1, "log_tail") < 0 ||
        require_shape(&draws, ids.n_rows, ids.width, "draws") < 0)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    rules.stamps = malloc(vocab_size);
    own = malloc(ids.width ? 4 * ids.width : 1);
    if (rules.stamps != NULL && own != NULL) {
        memset(rules.stamps, 0, vocab_size);
        status = rows_fit(&ids, &logprob, &tail, &draws, &rules, own);
    }
    Py_END_ALLOW_THREADS
done:
    free(rules.stamps);
    free(own);
    release(&ids), release(&logprob), release(&tail), release(&draws);
    return result_of(status);
}

/* ---- Copying rows of many arrays ---- */

static void copy_part(const Rows *to, Py_ssize_t to_start, const Rows *from, Py_ssize_t from_start,
                      Py_ssize_t n) {
    Py_ssize_t width = from->width, bytes = width * from->item;
    if (to->item != from->item) {
        int is_joined = from->stride == bytes && to->stride == 2 * bytes;
        Py_ssize_t size = is_joined ? n * width : width;
        for (Py_ssize_t row = 0; row < (is_joined ? n > 0 : n); row++) {
            const uint32_t *restrict source = row_at(from, from_start + row);
            int64_t *restrict target = row_at(to, to_start + row);
            for (Py_ssize_t i = 0; i < size; i++) target[i] = source[i];
        }
    } else if (to->stride == bytes && from->stride == bytes) {
        memmove(row_at(to, to_start), row_at(from, from_start), bytes * n);
    } else {
        for (Py_ssize_t row = 0; row < n; row++)
            memmove(row_at(to, to_start + row), row_at(from, from_start + row), bytes);
    }
}

/* Rows [from_start, from_start + n) of an array, and where the first goes. */
typedef struct {
    Rows from;
    Py_ssize_t to_start, from_start, n;
    int is_cut;
} Part;

/* A flat source of a destination with rows holds them end to end, and starts at an item. */
static void cut_into_rows(const Rows *to, Part *part) {
    Rows *from = &part->from;
    if (from->data == NULL || from->buffer.ndim != 1 || to->buffer.ndim != 2 || to->width < 1 ||
        from->stride != from->item || part->from_start < 0 || part->from_start > from->n_rows)
        return;
    from->data += part->from_start * from->item;
    from->n_rows = (from->n_rows - part->from_start) / to->width;
    from->width = to->width;
    from->stride = to->width * from->item;
    part->from_start = 0;
    part->is_cut = 1;
}

static int check_part(const Rows *to, const Part *part, Py_ssize_t number) {
    const Rows *from = &part->from;
    int items_fit = to->item == from->item || (to->item == 8 && from->item == 4);
    int rows_fit_in = from->width == to->width && (from->buffer.ndim == to->buffer.ndim || part->is_cut);
    if (from->data == NULL || !rows_fit_in || !items_fit) {
        PyErr_Format(PyExc_ValueError, "source %zd: its rows are not those of the destination", number);
        return FAILED;
    }
    Py_ssize_t n = part->n;
    if (n < 0 || part->to_start < 0 || part->from_start < 0 || n > to->n_rows || n > from->n_rows ||
        part->to_start > to->n_rows - n || part->from_start > from->n_rows - n) {
        PyErr_Format(PyExc_ValueError, "source %zd: %zd rows from %zd of %zd to %zd of %zd", number, n,
                     part->from_start, from->n_rows, part->to_start, to->n_rows);
        return FAILED;
    }
    return OK;
}

static int take_numbers(PyObject *object, Part *parts, Py_ssize_t n_parts, size_t field, const char *name) {
    Rows numbers;
    int status = take_flat(object, &numbers, 8, name);
    if (status == OK && (numbers.data == NULL || numbers.n_rows != n_parts)) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zd numbers", name, n_parts);
        status = FAILED;
    }
    for (Py_ssize_t i = 0; status == OK && i < n_parts; i++)
        *(Py_ssize_t *)((char *)&parts[i] + field) = (Py_ssize_t)((const int64_t *)numbers.data)[i];
    release(&numbers);
    return status;
}

static PyObject *copy_rows(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *to_o, *sources, *to_starts, *from_starts, *counts;
    if (!PyArg_ParseTuple(args, "OOO!OO", &to_o, &to_starts, &PyTuple_Type, &sources, &from_starts, &counts))
        return NULL;
    Rows to = {0};
    Py_ssize_t n_parts = PyTuple_Size(sources);
    int status = FAILED;
    Part *parts = calloc(n_parts ? n_parts : 1, sizeof *parts);
    if (parts == NULL || take_rows(to_o, &to, 1, 0, "dst") < 0) goto done;
    if (to.data == NULL) {
        PyErr_SetString(PyExc_ValueError, "dst: expected an array");
        goto done;
    }
    if (take_numbers(to_starts, parts, n_parts, offsetof(Part, to_start), "dst_starts") < 0 ||
        take_numbers(from_starts, parts, n_parts, offsetof(Part, from_start), "src_starts") < 0 ||
        take_numbers(counts, parts, n_parts, offsetof(Part, n), "counts") < 0)
        goto done;
    for (Py_ssize_t i = 0; i < n_parts; i++) {
        if (take_rows(PyTuple_GetItem(sources, i), &parts[i].from, 0, 0, "source") < 0) goto done;
        cut_into_rows(&to, &parts[i]);
        if (check_part(&to, &parts[i], i) < 0) goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n_parts; i++)
        copy_part(&to, parts[i].to_start, &parts[i].from, parts[i].from_start, parts[i].n);
    Py_END_ALLOW_THREADS
    status = OK;
done:
    for (Py_ssize_t i = 0; parts && i < n_parts; i++) release(&parts[i].from);
    free(parts);
    release(&to);
    if (status != OK) return result_of(FAILED);
    Py_INCREF(Py_None);
    return Py_None;
}

/* ---- Memory ---- */

static PyObject *let_go(PyObject *module, PyObject *mapped) {
    (void)module;
    Py_buffer buffer;
    if (PyObject_GetBuffer(mapped, &buffer, PyBUF_SIMPLE) < 0) return NULL;
#if defined(MADV_DONTNEED) && defined(_SC_PAGESIZE)
    /* Advice only: where it is refused, memory is given back when the system needs it. */
    if (buffer.readonly && buffer.len > 0 && (uintptr_t)buffer.buf % (size_t)sysconf(_SC_PAGESIZE) == 0)
        (void)madvise(buffer.buf, (size_t)buffer.len, MADV_DONTNEED);
#endif
    PyBuffer_Release(&buffer);
    Py_INCREF(Py_None);
    return Py_None;
}

/* ---- The module ---- */

static PyMethodDef methods[] = {
    {"decode_streams", decode_streams, METH_VARARGS, NULL},
    {"rows_are_fine", rows_are_fine, METH_VARARGS, NULL},
    {"copy_rows", copy_rows, METH_VARARGS, NULL},
    {"let_go", let_go, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&module); }
