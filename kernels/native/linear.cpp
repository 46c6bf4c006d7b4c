// Matrix product y[T, M] = x[T, K] w[M, K]^T + b with weights packed once into panels. Called through linear.py.
#include <vector>

#include "panels.h"

namespace {

// Tokens of one task: their inputs stay in the core's own cache while the task's panels pass by.
constexpr int64_t kTaskBytes = 384 << 10;

template <class T>
void product(const T* x, int64_t x_stride, const uint32_t* packed, const T* bias, T* y, int64_t tokens, int64_t inner,
             int64_t outputs) {
  int64_t inner_words = inner / kPerWord<T>, panels = (outputs + kPanel - 1) / kPanel;
  int64_t block = std::max<int64_t>(kRows, kTaskBytes / (inner * int64_t(sizeof(T))) / kRows * kRows);
  int64_t blocks = (tokens + block - 1) / block;
#pragma omp parallel
  {
    std::vector<const T*> inputs(size_t(block) + 1);
#pragma omp for schedule(static) collapse(2)
    for (int64_t part = 0; part < blocks; part++)
      for (int64_t p = 0; p < panels; p++) {
        int64_t begin = tokens * part / blocks, end = tokens * (part + 1) / blocks;
        int width = int(std::min<int64_t>(kPanel, outputs - p * kPanel));
        for (int64_t t = begin; t < end; t++) inputs[t - begin] = x + t * x_stride;
        panel_product(end - begin, inputs.data(), packed + p * inner_words * kPanel, inner_words,
                      bias ? bias + p * kPanel : nullptr, y + begin * outputs + p * kPanel, outputs, width);
      }
  }
}

template <class T>
void pack(const T* w, uint32_t* packed, int64_t outputs, int64_t inner) {
  int64_t inner_words = inner / kPerWord<T>, panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t m = 0; m < kPanel; m++) {
      const T* row = w + (p * kPanel + m) * inner;
      uint32_t* out = packed + p * inner_words * kPanel + m;
      for (int64_t k = 0; k < inner_words; k++)
        if (p * kPanel + m < outputs)
          std::memcpy(out + k * kPanel, row + k * kPerWord<T>, 4);
        else
          out[k * kPanel] = 0;
    }
}

}  // namespace

extern "C" {
void penstock_pack_f32(const float* w, uint32_t* packed, int64_t outputs, int64_t inner) { pack(w, packed, outputs, inner); }
void penstock_pack_bf16(const bf16* w, uint32_t* packed, int64_t outputs, int64_t inner) { pack(w, packed, outputs, inner); }
void penstock_linear_f32(const float* x, int64_t stride, const uint32_t* packed, const float* bias, float* y,
                         int64_t tokens, int64_t inner, int64_t outputs) {
  product(x, stride, packed, bias, y, tokens, inner, outputs);
}
void penstock_linear_bf16(const bf16* x, int64_t stride, const uint32_t* packed, const bf16* bias, bf16* y,
                          int64_t tokens, int64_t inner, int64_t outputs) {
  product(x, stride, packed, bias, y, tokens, inner, outputs);
}
}
