// Low-rank updates y += scale * B (A x) for tiles of tokens of one adapter each. Called through lora.py.
//
// A token's result is the same whatever stands beside it, bitwise: every number is one chain of additions whose order
// depends on the rank and the sizes alone. B's rows are short, so sixteen of them are turned once per tile and then
// serve its tokens lane by lane.
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kTile = 16;  // tokens, at most

struct Sizes {
  int64_t tiles, rank, inner, outputs, x_stride, y_stride, a_slot, a_row, b_slot, b_row;
};

template <class T>
INLINE float dot(const T* a, const T* x, int64_t inner) {
  Floats even = floats(0), odd = floats(0);
  int64_t k = 0;
  for (; k + 2 * kLanes <= inner; k += 2 * kLanes) {
    even += load(a + k) * load(x + k);
    odd += load(a + k + kLanes) * load(x + k + kLanes);
  }
  for (; k < inner; k += kLanes) {
    int count = int(std::min<int64_t>(kLanes, inner - k));
    even += load_part(a + k, count) * load_part(x + k, count);
  }
  return sum(even + odd);
}

template <class T>
void update(const T* x, const T* a, const T* b, const float* scales, T* y, const int64_t* order, const int64_t* tiles,
            const Sizes& size) {
#pragma omp parallel
  {
    std::vector<float> low(size_t(kTile * size.rank)), turned(size_t(kLanes * size.rank));
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < size.tiles; tile++) {
      int64_t slot = tiles[3 * tile], begin = tiles[3 * tile + 1], count = tiles[3 * tile + 2] - begin;
      const T *down = a + slot * size.a_slot, *up = b + slot * size.b_slot;
      float scale = scales[slot];
      for (int64_t r = 0; r < size.rank; r++)
        for (int64_t t = 0; t < count; t++)
          low[t * size.rank + r] = scale * dot(down + r * size.a_row, x + order[begin + t] * size.x_stride, size.inner);
      for (int64_t m = 0; m < size.outputs; m += kLanes) {
        int width = int(std::min<int64_t>(kLanes, size.outputs - m));
        for (int64_t r = 0; r < size.rank; r++)
          for (int lane = 0; lane < kLanes; lane++)
            turned[r * kLanes + lane] = lane < width ? widen(up[(m + lane) * size.b_row + r]) : 0.0f;
        for (int64_t t = 0; t < count; t++) {
          T* out = y + order[begin + t] * size.y_stride + m;
          Floats total = floats(0);
          for (int64_t r = 0; r < size.rank; r++) total += load(&turned[r * kLanes]) * low[t * size.rank + r];
          store_part(out, load_part(out, width) + total, width);
        }
      }
    }
  }
}

}  // namespace

extern "C" {
void penstock_lora_f32(const float* x, const float* a, const float* b, const float* scales, float* y,
                       const int64_t* order, const int64_t* tiles, const Sizes* size) {
  update(x, a, b, scales, y, order, tiles, *size);
}
void penstock_lora_bf16(const bf16* x, const bf16* a, const bf16* b, const float* scales, bf16* y,
                        const int64_t* order, const int64_t* tiles, const Sizes* size) {
  update(x, a, b, scales, y, order, tiles, *size);
}
}
