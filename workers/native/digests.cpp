// Chains of SHA-256 digests over the blocks of a prompt. Called by native/digests.py; kv/prefix_cache.py has the
// definition. Method: FIPS 180-4, section 6.2, by the processor's own SHA instructions; where it has none, nothing here
// would be faster than what Python brings.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr int64_t kDigest = 32, kChunk = 64, kLongest = 4096;

alignas(16) constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr uint32_t kStart[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// The instructions keep the state as (a b e f) and (c d g h), highest word first, and do two rounds at once.
__attribute__((target("sha,sse4.1"))) void compress(uint32_t* state, const uint8_t* chunk) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const __m128i abef_before = _mm_set_epi32(state[0], state[1], state[4], state[5]);
  const __m128i cdgh_before = _mm_set_epi32(state[2], state[3], state[6], state[7]);
  __m128i abef = abef_before, cdgh = cdgh_before, w[4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    __m128i& now = w[i % 4];
    if (i < 4) {
      now = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk) + i), swap);
    } else {
      const __m128i &next = w[(i + 1) % 4], &last = w[(i + 3) % 4];
      const __m128i seventh = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
      now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, next), seventh), last);
    }
    const __m128i sum = _mm_add_epi32(now, _mm_load_si128(reinterpret_cast<const __m128i*>(kRounds) + i));
    cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
    abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
  }
  alignas(16) uint32_t high[4], low[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm_add_epi32(abef, abef_before));
  _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm_add_epi32(cdgh, cdgh_before));
  const uint32_t after[8] = {high[3], high[2], low[3], low[2], high[1], high[0], low[1], low[0]};
  std::memcpy(state, after, sizeof after);
}

bool has_instructions() {
  uint32_t a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return __builtin_cpu_supports("sse4.1") && (b >> 29 & 1);
}

}  // namespace

// `digests` [blocks, 32]: of the digest before, `root` for the first, and the block's `width` bytes, at most
// `kLongest`. Returns the number of blocks, or -1 where this machine, or a block so long, is not for it.
extern "C" int64_t penstock_chain(const uint8_t* root, const uint8_t* tokens, int64_t width, int64_t blocks,
                                  uint8_t* digests) {
  static const bool possible = has_instructions();
  if (!possible || width > kLongest) return -1;
  alignas(16) uint8_t message[kDigest + kLongest + 2 * kChunk];
  const int64_t size = kDigest + width, padded = (size + 9 + kChunk - 1) / kChunk * kChunk;
  std::memset(message + size, 0, padded - size);
  message[size] = 0x80;
  for (int i = 0; i < 8; ++i) message[padded - 1 - i] = uint64_t(size) * 8 >> (8 * i);
  for (int64_t block = 0; block < blocks; ++block) {
    std::memcpy(message, block ? digests + (block - 1) * kDigest : root, kDigest);
    std::memcpy(message + kDigest, tokens + block * width, width);
    uint32_t state[8];
    std::memcpy(state, kStart, sizeof state);
    for (int64_t at = 0; at < padded; at += kChunk) compress(state, message + at);
    for (int i = 0; i < 8; ++i) state[i] = __builtin_bswap32(state[i]);
    std::memcpy(digests + block * kDigest, state, kDigest);
  }
  return blocks;
}

#else

extern "C" int64_t penstock_chain(const uint8_t*, const uint8_t*, int64_t, int64_t, uint8_t*) { return -1; }

#endif
