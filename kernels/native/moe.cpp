// Mixture of experts: tokens sorted by expert, two grouped products over packed panels, each token's terms summed in the
// order of its experts. Called through kernels/native/moe.py.
#include <vector>

#include "panels.h"

namespace {

struct Experts {
  const int64_t* order;    // [n] flat rows t * k + j in the order of their experts
  const int64_t* offsets;  // [E + 1] where each expert's rows begin in `order`
  int64_t num_experts, chosen, tokens, inputs, width;
  int gelu;
};

template <class T>
INLINE void gate_row(const T* x, T* y, int64_t width, int gelu) {
  for (int64_t d = 0; d < width; d += kLanes) {
    int count = int(std::min<int64_t>(kLanes, width - d));
    Floats z = load_part(x + d, count), up = load_part(x + width + d, count);
    Floats gated = gelu ? 0.5f * z * (1.0f + tangent(0.7978845608f * (z + 0.044715f * z * z * z)))
                        : z / (1.0f + exponential(-z));
    store_part(y + d, gated * up, count);
  }
}

// scratch: rows of `order`: hidden [n, 2 F] and gated [n, F] of T; terms [tokens * k, K] float, by flat row.
template <class T>
void experts(const T* x, const uint32_t* gate_up, const uint32_t* down, const float* weights, const Experts& e, T* hidden,
             T* gated, float* terms, T* y) {
  int64_t in_words = e.inputs / kPerWord<T>, width_words = e.width / kPerWord<T>;
  int64_t up_panels = (2 * e.width + kPanel - 1) / kPanel, down_panels = (e.inputs + kPanel - 1) / kPanel;
  int64_t first = e.offsets[0], total = e.offsets[e.num_experts] - first, most = 1;
  for (int64_t i = 0; i < e.num_experts; i++) most = std::max(most, e.offsets[i + 1] - e.offsets[i]);
#pragma omp parallel
  {
    std::vector<const T*> rows(most);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t expert = 0; expert < e.num_experts; expert++)
      for (int64_t p = 0; p < up_panels; p++) {
        int64_t begin = e.offsets[expert], count = e.offsets[expert + 1] - begin;
        if (count == 0) continue;
        for (int64_t i = 0; i < count; i++) rows[i] = x + e.order[begin + i] / e.chosen * e.inputs;
        panel_product<T, T>(count, rows.data(), gate_up + (expert * up_panels + p) * in_words * kPanel, in_words, nullptr,
                            hidden + (begin - first) * 2 * e.width + p * kPanel, 2 * e.width,
                            int(std::min<int64_t>(kPanel, 2 * e.width - p * kPanel)));
      }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; i++) gate_row(hidden + i * 2 * e.width, gated + i * e.width, e.width, e.gelu);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t expert = 0; expert < e.num_experts; expert++)
      for (int64_t p = 0; p < down_panels; p++) {
        int64_t begin = e.offsets[expert], count = e.offsets[expert + 1] - begin;
        if (count == 0) continue;
        for (int64_t i = 0; i < count; i++) rows[i] = gated + (begin - first + i) * e.width;
        panel_product<T, float>(count, rows.data(), down + (expert * down_panels + p) * width_words * kPanel, width_words,
                                nullptr, terms + (begin - first) * e.inputs + p * kPanel, e.inputs,
                                int(std::min<int64_t>(kPanel, e.inputs - p * kPanel)));
      }
  }
  // Where each flat row's term is; -1 for a choice of no expert.
  std::vector<int64_t> places(e.tokens * e.chosen, -1);
  for (int64_t i = 0; i < total; i++) places[e.order[first + i]] = i;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < e.tokens; t++)
    for (int64_t d = 0; d < e.inputs; d += kLanes) {
      int count = int(std::min<int64_t>(kLanes, e.inputs - d));
      Floats sum{};
      for (int64_t j = t * e.chosen; j < (t + 1) * e.chosen; j++)
        if (places[j] >= 0) sum += load_part(terms + places[j] * e.inputs + d, count) * weights[j];
      store_part(y + t * e.inputs + d, sum, count);
    }
}

}  // namespace

extern "C" {
void penstock_moe_f32(const float* x, const uint32_t* gate_up, const uint32_t* down, const float* weights,
                      const Experts* e, float* hidden, float* gated, float* terms, float* y) {
  experts(x, gate_up, down, weights, *e, hidden, gated, terms, y);
}
void penstock_moe_bf16(const bf16* x, const uint32_t* gate_up, const uint32_t* down, const float* weights,
                       const Experts* e, bf16* hidden, bf16* gated, float* terms, bf16* y) {
  experts(x, gate_up, down, weights, *e, hidden, gated, terms, y);
}
}
