// Norms, gated activations, and what stands between the query-key-value projection and attention: head norms, rotary
// embedding and the write into the KV blocks, in one pass. Called through kernels/native/elementwise.py.
#include "vectors.h"

namespace {

// Below this many numbers a step costs less than waking the other threads.
constexpr int64_t kWorthThreads = 1 << 15;

INLINE Floats finite(Floats x, float most) {
  x = choose(x != x, floats(0.0f), x);
  x = choose(x > floats(most), floats(most), x);
  return choose(x < floats(-most), floats(-most), x);
}
INLINE float largest_number(const float*) { return 3.4028234663852886e38f; }
INLINE float largest_number(const bf16*) { return 3.3895313892515355e38f; }

template <class T>
INLINE float root_mean_square(const T* x, int64_t size, float eps) {
  Floats total{};
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats part = load_part(x + d, int(std::min<int64_t>(kLanes, size - d)));
    total += part * part;
  }
  return 1.0f / std::sqrt(sum(total) / float(size) + eps);
}

// A weight of x's own dtype multiplies the rounded quotient, a wider one the quotient itself, as ops.rms_norm says.
template <class T, class W>
void norm(const T* x, const T* residual, const W* weight, T* normed, T* total, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > kWorthThreads)
  for (int64_t row = 0; row < rows; row++) {
    const T* source = x + row * size;
    if (residual) {
      T* added = total + row * size;
      for (int64_t d = 0; d < size; d += kLanes) {
        int count = int(std::min<int64_t>(kLanes, size - d));
        store_part(added + d, load_part(source + d, count) + load_part(residual + row * size + d, count), count);
      }
      source = added;
    }
    float factor = root_mean_square(source, size, eps);
    for (int64_t d = 0; d < size; d += kLanes) {
      int count = int(std::min<int64_t>(kLanes, size - d));
      store_part(normed + row * size + d, load_part(source + d, count) * factor * load_part(weight + d, count), count);
    }
  }
}

enum Gate { kSilu = 0, kGeluTanh = 1 };

template <class T>
void gate(const T* x, T* y, int64_t rows, int64_t width, int kind) {
#pragma omp parallel for schedule(static) if (rows * width > kWorthThreads / 4)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t d = 0; d < width; d += kLanes) {
      int count = int(std::min<int64_t>(kLanes, width - d));
      Floats z = load_part(x + row * 2 * width + d, count), up = load_part(x + row * 2 * width + width + d, count);
      Floats gated = kind == kSilu
                         ? z / (1.0f + exponential(-z))
                         : 0.5f * z * (1.0f + tangent(0.7978845608f * (z + 0.044715f * z * z * z)));
      store_part(y + row * width + d, gated * up, count);
    }
}

struct Heads {
  int64_t query_heads, kv_heads, dim;
  int64_t block_stride, part_stride, slots;  // elements; the layer's first block starts at kv
  float eps;
};

// Rotates one head in float32 after its norm: y[j] = x[j] c - x[j + h] s, y[j + h] = x[j + h] c + x[j] s.
template <class T>
INLINE void rotate(const T* x, T* y, const float* weight, const float* cos, const float* sin, const Heads& shape,
                   bool stored) {
  int64_t half = shape.dim / 2;
  float factor = weight ? root_mean_square(x, shape.dim, shape.eps) : 1.0f;
  float most = largest_number(x);
  for (int64_t d = 0; d < half; d += kLanes) {
    int count = int(std::min<int64_t>(kLanes, half - d));
    Floats first = load_part(x + d, count), second = load_part(x + half + d, count);
    if (weight) {
      first = first * factor * load_part(weight + d, count);
      second = second * factor * load_part(weight + half + d, count);
    }
    Floats c = load_part(cos + d, count), s = load_part(sin + d, count);
    Floats low = first * c - second * s, high = second * c + first * s;
    store_part(y + d, stored ? finite(low, most) : low, count);
    store_part(y + half + d, stored ? finite(high, most) : high, count);
  }
}

// Queries are rotated in place; keys and values go to their slots. slots[t]: block * slots + slot of token t.
template <class T>
void rotate_and_store(T* qkv, T* kv, const float* weights, const float* cos, const float* sin, const int64_t* places,
                      int64_t tokens, const Heads& shape) {
  int64_t dim = shape.dim, heads = shape.query_heads + 2 * shape.kv_heads;
#pragma omp parallel for schedule(static) if (tokens * heads * dim > kWorthThreads)
  for (int64_t t = 0; t < tokens; t++) {
    T* token = qkv + t * heads * dim;
    const float *c = cos + t * dim / 2, *s = sin + t * dim / 2;
    T* slot = kv + places[t] / shape.slots * shape.block_stride + places[t] % shape.slots * dim;
    for (int64_t h = 0; h < shape.query_heads; h++)
      rotate(token + h * dim, token + h * dim, weights ? weights + h * dim : nullptr, c, s, shape, false);
    for (int64_t h = 0; h < shape.kv_heads; h++) {
      int64_t from = shape.query_heads + h;
      T* key = slot + h * shape.slots * dim;
      rotate(token + from * dim, key, weights ? weights + from * dim : nullptr, c, s, shape, true);
      const T* value = token + (from + shape.kv_heads) * dim;
      float most = largest_number(value);
      for (int64_t d = 0; d < dim; d += kLanes) {
        int count = int(std::min<int64_t>(kLanes, dim - d));
        store_part(key + shape.part_stride + d, finite(load_part(value + d, count), most), count);
      }
    }
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                             \
  void penstock_norm_##suffix(const T* x, const T* residual, const T* weight, T* normed, T* total, int64_t rows,      \
                              int64_t size, float eps) {                                                              \
    norm(x, residual, weight, normed, total, rows, size, eps);                                                        \
  }                                                                                                                   \
  void penstock_norm_wide_##suffix(const T* x, const T* residual, const float* weight, T* normed, T* total,           \
                                   int64_t rows, int64_t size, float eps) {                                           \
    norm(x, residual, weight, normed, total, rows, size, eps);                                                        \
  }                                                                                                                   \
  void penstock_gate_##suffix(const T* x, T* y, int64_t rows, int64_t width, int kind) {                              \
    gate(x, y, rows, width, kind);                                                                                    \
  }                                                                                                                   \
  void penstock_rotate_and_store_##suffix(T* qkv, T* kv, const float* weights, const float* cos, const float* sin,    \
                                          const int64_t* places, int64_t tokens, const Heads* shape) {                \
    rotate_and_store(qkv, kv, weights, cos, sin, places, tokens, *shape);                                             \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bf16)
}
