/* SHA-256 of many 4096-byte blocks at once: each lane of a vector register works on a block of its own.
 *
 * fs-verity hashes blocks that have nothing to do with one another. hashlib takes them one by one, in 11 us each on a
 * processor without SHA instructions; side by side it is 2 us a block with AVX-512, 6 us with AVX2. FIPS 180-4,
 * https://csrc.nist.gov/pubs/fips/180-4/upd1/final, section 6.2; names of variables are those of the standard.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are swapped as a little-endian processor needs it"
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

#define LANES 16
#define BLOCK 4096
#define DIGEST 32
#define CHUNK 64 /* what the hash takes at a time */

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static const uint32_t H0[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define CH(x, y, z) ((z) ^ ((x) & ((y) ^ (z))))
#define MAJ(x, y, z) (((x) & (y)) | ((z) & ((x) | (y))))
#define SIGMA0(x) (ROTR(x, 2) ^ ROTR(x, 13) ^ ROTR(x, 22))
#define SIGMA1(x) (ROTR(x, 6) ^ ROTR(x, 11) ^ ROTR(x, 25))
#define sigma0(x) (ROTR(x, 7) ^ ROTR(x, 18) ^ (x) >> 3)
#define sigma1(x) (ROTR(x, 17) ^ ROTR(x, 19) ^ (x) >> 10)

/* Load the 16 words of a chunk of each block, most significant byte first: word by word. */
static inline __attribute__((always_inline)) void load(lanes W[16], const uint8_t *const blocks[LANES], size_t at)
{
    for (int t = 0; t < 16; t++)
        for (int lane = 0; lane < LANES; lane++) {
            uint32_t word;
            memcpy(&word, blocks[lane] + at + 4 * t, 4);
            W[t][lane] = __builtin_bswap32(word);
        }
}

#if !defined __has_builtin || !__has_builtin(__builtin_shufflevector) /* GCC before 12 */
#define load_lines load
#else
/* Transpose squares of 2 x D: exchange what is off their diagonals. The indices have to be constants. */
#define FIRST(D, j) ((j) & (D) ? 16 + (j) - (D) : (j))
#define SECOND(D, j) ((j) & (D) ? 16 + (j) : (j) + (D))
#define PICK(WHICH, D, a, b) \
    __builtin_shufflevector(a, b, WHICH(D, 0), WHICH(D, 1), WHICH(D, 2), WHICH(D, 3), WHICH(D, 4), WHICH(D, 5), \
                            WHICH(D, 6), WHICH(D, 7), WHICH(D, 8), WHICH(D, 9), WHICH(D, 10), WHICH(D, 11), \
                            WHICH(D, 12), WHICH(D, 13), WHICH(D, 14), WHICH(D, 15))
#define EXCHANGE(to, from, D) \
    for (int i = 0; i < 16; i++) \
        if (!(i & D)) { \
            to[i] = PICK(FIRST, D, from[i], from[i + D]); \
            to[i + D] = PICK(SECOND, D, from[i], from[i + D]); \
        }

/* The same, where a register takes all lanes: a line of the cache from each block, then the square is transposed. */
static inline __attribute__((always_inline)) void load_lines(lanes W[16], const uint8_t *const blocks[LANES], size_t at)
{
    lanes other[16];
    for (int lane = 0; lane < LANES; lane++)
        memcpy(&W[lane], blocks[lane] + at, CHUNK);
    EXCHANGE(other, W, 1)
    EXCHANGE(W, other, 2)
    EXCHANGE(other, W, 4)
    EXCHANGE(W, other, 8)
    for (int t = 0; t < 16; t++)
        W[t] = (ROTR(W[t], 8) & 0xff00ff00) | (ROTR(W[t], 24) & 0x00ff00ff);
}
#endif

/* Take a chunk of each block into H. The message schedule is a ring of 16 words, made while they are used. */
static inline __attribute__((always_inline)) void compress(lanes H[8], lanes W[16])
{
    lanes a = H[0], b = H[1], c = H[2], d = H[3], e = H[4], f = H[5], g = H[6], h = H[7];
    for (int round = 0; round < 64; round += 16) {
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++) {
            if (round)
                W[t] += sigma0(W[(t + 1) & 15]) + W[(t + 9) & 15] + sigma1(W[(t + 14) & 15]);
            lanes T1 = h + SIGMA1(e) + CH(e, f, g) + W[t] + K[round + t];
            lanes T2 = SIGMA0(a) + MAJ(a, b, c);
            h = g, g = f, f = e, e = d + T1, d = c, c = b, b = a, a = T1 + T2;
        }
    }
    H[0] += a, H[1] += b, H[2] += c, H[3] += d, H[4] += e, H[5] += f, H[6] += g, H[7] += h;
}

/* Hash LANES blocks of BLOCK bytes; `digests` takes the first `wanted` of the digests, one after the other. */
static inline __attribute__((always_inline)) void hash(const uint8_t *const blocks[LANES], uint8_t *digests, size_t wanted,
                                                       int by_lines)
{
    lanes H[8], W[16];
    for (int i = 0; i < 8; i++)
        H[i] = (lanes){0} + H0[i];
    for (size_t at = 0; at < BLOCK; at += CHUNK) {
        if (by_lines)
            load_lines(W, blocks, at);
        else
            load(W, blocks, at);
        compress(H, W);
    }
    /* The padding is a chunk of its own: a one bit, zeros, and the length in bits. */
    for (int t = 0; t < 16; t++)
        W[t] = (lanes){0};
    W[0] += 0x80000000;
    W[15] += 8 * BLOCK;
    compress(H, W);
    for (size_t lane = 0; lane < wanted; lane++)
        for (int i = 0; i < 8; i++) {
            uint32_t word = __builtin_bswap32(H[i][lane]);
            memcpy(digests + lane * DIGEST + 4 * i, &word, 4);
        }
}

typedef void (*hasher)(const uint8_t *const blocks[LANES], uint8_t *digests, size_t wanted);

/* The same for each kind of vector registers: the compiler puts `hash` into each. */
static void hash_plain(const uint8_t *const blocks[LANES], uint8_t *digests, size_t wanted)
{
    hash(blocks, digests, wanted, 0);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static void hash_avx2(const uint8_t *const blocks[LANES], uint8_t *digests, size_t wanted)
{
    hash(blocks, digests, wanted, 0);
}

__attribute__((target("avx512f"))) static void hash_avx512(const uint8_t *const blocks[LANES], uint8_t *digests, size_t wanted)
{
    hash(blocks, digests, wanted, 1);
}
#endif

/* Hash the blocks of `data`; the last one may be short, and is then padded with zeros in `spare`. */
static void hash_all(hasher hash_lanes, const uint8_t *data, size_t size, uint8_t *digests)
{
    uint8_t spare[BLOCK] = {0};
    size_t count = (size + BLOCK - 1) / BLOCK;
    memcpy(spare, data + size / BLOCK * BLOCK, size % BLOCK);
    for (size_t first = 0; first < count; first += LANES) {
        const uint8_t *blocks[LANES];
        size_t wanted = count - first < LANES ? count - first : LANES;
        for (size_t lane = 0; lane < LANES; lane++) {
            size_t at = (first + lane) * BLOCK;
            blocks[lane] = at + BLOCK <= size ? data + at : spare;
        }
        hash_lanes(blocks, digests + first * DIGEST, wanted);
    }
}

/* What this processor can do, the best first; `plain` is there for tests on processors that have nothing better. */
static struct variant {
    const char *name;
    hasher hash;
} variants[3];
static Py_ssize_t variant_count;

static void find_variants(void)
{
    if (variant_count) /* the module is loaded once more, while another thread may be hashing */
        return;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        variants[variant_count++] = (struct variant){"avx512", hash_avx512};
    if (__builtin_cpu_supports("avx2"))
        variants[variant_count++] = (struct variant){"avx2", hash_avx2};
#endif
    variants[variant_count++] = (struct variant){"plain", hash_plain};
}

/* Whether the processor has instructions for SHA-256, which hashlib uses. */
static int has_sha_instructions(void)
{
#ifdef __x86_64__
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
#else
    return 1; /* not looked for: hashlib is taken unmeasured */
#endif
}

static PyObject *sha256_blocks(PyObject *module, PyObject *arguments)
{
    Py_buffer data;
    Py_ssize_t which = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*|n:sha256_blocks", &data, &which))
        return NULL;
    PyObject *digests = NULL;
    if (which < 0 || which >= variant_count)
        PyErr_SetString(PyExc_IndexError, "there is no such variant");
    else
        digests = PyBytes_FromStringAndSize(NULL, (data.len + BLOCK - 1) / BLOCK * DIGEST);
    if (digests != NULL) {
        /* Nobody else has the bytes object yet, and the buffer cannot be resized while it is held. */
        uint8_t *into = (uint8_t *)PyBytes_AsString(digests);
        Py_BEGIN_ALLOW_THREADS
        hash_all(variants[which].hash, data.buf, (size_t)data.len, into);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return digests;
}

static PyMethodDef methods[] = {
    {"sha256_blocks", sha256_blocks, METH_VARARGS,
     "sha256_blocks(data, variant=0, /)\n--\n\n"
     "Return the SHA-256 of each 4096-byte block of data, one after the other; the last block is padded with zeros."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    find_variants();
    PyObject *names = PyTuple_New(variant_count);
    if (names == NULL)
        return -1;
    for (Py_ssize_t at = 0; at < variant_count; at++) {
        PyObject *name = PyUnicode_FromString(variants[at].name);
        if (name == NULL || PyTuple_SetItem(names, at, name) < 0) {
            Py_DECREF(names);
            return -1;
        }
    }
    int failed = PyModule_AddObjectRef(module, "VARIANTS", names);
    Py_DECREF(names);
    if (failed || PyModule_AddIntConstant(module, "LANES", LANES) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "SHA_INSTRUCTIONS", has_sha_instructions());
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_lanes",
    .m_doc = "SHA-256 of many 4096-byte blocks at once.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__lanes(void)
{
    return PyModuleDef_Init(&definition);
}
