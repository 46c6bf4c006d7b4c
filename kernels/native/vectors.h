// Sixteen-lane vectors in the compiler's own vector types, so that one source serves AVX-512, AVX2 and Arm.
// A "word" is 32 bits of a matrix along its inner dimension: one float, or a pair of bfloat16 numbers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
struct bf16 {
  uint16_t bits;
};

// The numbers of two rows side by side: word d is (first[d], second[d]); for 32 numbers each.
#ifdef __AVX512BW__
static inline __attribute__((always_inline)) void interleave(const bf16* first, const bf16* second, uint32_t* out) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(a, high, b));
}
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE Floats floats(float x) { return Floats{} + x; }
INLINE Words words(uint32_t x) { return Words{} + x; }
INLINE Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
INLINE Words load_words(const void* p) { return *reinterpret_cast<const Words*>(p); }
INLINE void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
INLINE Floats load(const bf16* p) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
// Round to nearest even; a NaN stays one.
INLINE Halves narrow(Floats x) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words nan = (Words)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40u) & nan), Halves);
#endif
}
INLINE void store(bf16* p, Floats x) { *reinterpret_cast<Halves*>(p) = narrow(x); }
INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
INLINE void assign(float* p, float x) { *p = x; }
INLINE void assign(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
// The first `count` (1 to 16) lanes of memory that may end there.
template <class T>
INLINE Floats load_part(const T* p, int count) {
  if (count >= kLanes) return load(p);
  T held[kLanes] = {};
  std::memcpy(held, p, count * sizeof(T));
  return load(held);
}
template <class T>
INLINE void store_part(T* p, Floats x, int count) {
  if (count >= kLanes) return store(p, x);
  T held[kLanes];
  store(held, x);
  std::memcpy(p, held, count * sizeof(T));
}

INLINE Floats choose(Ints which, Floats yes, Floats no) {
  return (Floats)(((Words)which & (Words)yes) | (~(Words)which & (Words)no));
}
INLINE Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return choose(a > b, a, b);
#endif
}
INLINE float sum(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += x[i];
  return total;
#endif
}
INLINE float largest(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < kLanes; i++) top = std::max(top, x[i]);
  return top;
#endif
}

// acc += a * b over the words' numbers, in float.
INLINE Floats multiply_add(Floats acc, Words a, Words b, const float*) { return acc + (Floats)a * (Floats)b; }
INLINE Floats multiply_add(Floats acc, Words a, Words b, const bf16*) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc += (Floats)(a << 16) * (Floats)(b << 16);
  return acc + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

// e^x to about two units in the last place; 0 below -104, infinity above 88.8, NaN for NaN.
INLINE Floats exponential(Floats x) {
#ifdef __AVX512F__
  // The comparisons give their second operand where one is NaN.
  __m512 bounded = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));
  Floats n = (Floats)_mm512_roundscale_ps((__m512)((Floats)bounded * 1.44269504f), 0);
#else
  Floats bounded = choose(x < floats(-104.0f), floats(-104.0f), choose(x > floats(89.0f), floats(89.0f), x));
  const Floats magic = floats(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats shifted = bounded * 1.44269504f + magic;
  Ints power = (Ints)shifted - (Ints)magic;
  Floats n = shifted - magic;
#endif
  Floats r = (Floats)bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats y = floats(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
#ifdef __AVX512F__
  return (Floats)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  // In two factors, so that neither the largest nor the smallest powers of two overflow on their own.
  Ints half = power >> 1;
  y = y * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
  return choose(x != x, x, y);
#endif
}
INLINE Floats tangent(Floats x) {  // hyperbolic
  Floats square = x * x;
  Floats small = x * (1.0f + square * (-0.333333333f + square * (0.133333333f + square * (-0.0539682540f + square * 0.0218694885f))));
  Floats large = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  return choose(square < floats(0.04f), small, large);
}
