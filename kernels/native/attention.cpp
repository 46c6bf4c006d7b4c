// Causal attention of a ragged batch over paged keys and values. Called through kernels/native/attention.py.
//
// A task is one tile of a row's new tokens with one key-value head: its lines are (token, query head of the group), so
// that a key is read once for the whole group. Keys pass in chunks of 64 at absolute positions 0, 64, ...; each is put
// into the order of a matrix operand once per tile, scores and the weighted values are small matrix products, and the
// softmax runs online (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1). Since chunks lie at absolute
// positions and no sum crosses lines, a line's result does not depend on the batch or on how its prompt was cut.
#include <memory>

#include "vectors.h"

namespace {

constexpr int kChunk = 64;  // keys
constexpr int kVectors = kChunk / kLanes;
constexpr int kRows = 6;
constexpr int kFewLines = 4;
constexpr int64_t kMostDim = 1024;

struct Tile {
  int32_t row, begin, end;  // tokens of the row, counted from its first new one
};

struct Batch {
  const int32_t* starts;
  const int32_t* offsets;
  const int32_t* tables;
  int64_t table_width;
  const Tile* tiles;
  int64_t num_tiles;
};

struct Shape {
  int64_t q_stride, block_stride, part_stride, head_stride;  // elements
  int64_t kv_heads, group, slots, dim, value_dim;
  float scale, soft_cap;
  int64_t window;
};

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif

template <int Step>
INLINE void exchange(Words* m) {
  for (int i = 0; i < kLanes; i++) {
    if (i & Step) continue;
    Words a = m[i], b = m[i + Step];
    if (Step == 8) {
      m[i] = PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      m[i + 8] = PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    } else if (Step == 4) {
      m[i] = PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      m[i + 4] = PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    } else if (Step == 2) {
      m[i] = PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      m[i + 2] = PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    } else {
      m[i] = PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
      m[i + 1] = PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
  }
}

INLINE void transpose(Words* m) {
  exchange<8>(m);
  exchange<4>(m);
  exchange<2>(m);
  exchange<1>(m);
}

// acc[line][vector] (+)= sum over words of a[line][word] * b[word][vector], for up to kRows lines.
template <class T, int Rows>
INLINE void small_product(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t num_words,
                          float* out, int64_t out_stride, const float* rescale) {
  Floats acc[Rows][kVectors];
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < kVectors; v++)
      acc[r][v] = rescale ? load(out + r * out_stride + v * kLanes) * rescale[r] : Floats{};
  for (int64_t w = 0; w < num_words; w++) {
    Words column[kVectors];
    for (int v = 0; v < kVectors; v++) column[v] = load_words(b + w * b_stride + v * kLanes);
    for (int r = 0; r < Rows; r++) {
      Words line = words(a[r * a_stride + w]);
      for (int v = 0; v < kVectors; v++) acc[r][v] = multiply_add(acc[r][v], line, column[v], (const T*)nullptr);
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < kVectors; v++) store(out + r * out_stride + v * kLanes, acc[r][v]);
}

template <class T>
void small_products(int64_t lines, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                    int64_t num_words, float* out, int64_t out_stride, const float* rescale) {
  int64_t tiles = (lines + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; i++) {
    int64_t from = lines * i / tiles, to = lines * (i + 1) / tiles;
    const uint32_t* rows = a + from * a_stride;
    float* target = out + from * out_stride;
    const float* factor = rescale ? rescale + from : nullptr;
    switch (to - from) {
      case 1: small_product<T, 1>(rows, a_stride, b, b_stride, num_words, target, out_stride, factor); break;
      case 2: small_product<T, 2>(rows, a_stride, b, b_stride, num_words, target, out_stride, factor); break;
      case 3: small_product<T, 3>(rows, a_stride, b, b_stride, num_words, target, out_stride, factor); break;
      case 4: small_product<T, 4>(rows, a_stride, b, b_stride, num_words, target, out_stride, factor); break;
      case 5: small_product<T, 5>(rows, a_stride, b, b_stride, num_words, target, out_stride, factor); break;
      default: small_product<T, 6>(rows, a_stride, b, b_stride, num_words, target, out_stride, factor); break;
    }
  }
}

// What one thread needs for a tile; sized once for the largest tile of the call.
template <class T>
struct Scratch {
  int64_t lines, key_words, padded_dim;
  std::unique_ptr<uint32_t[]> query, keys, values, weights;
  std::unique_ptr<float[]> scores, out, top, total, rescale;

  Scratch(int64_t lines, int64_t dim, int64_t value_dim)
      : lines(lines), key_words(dim * int64_t(sizeof(T)) / 4), padded_dim((value_dim + 63) / 64 * 64) {
    query.reset(new uint32_t[lines * key_words]);
    keys.reset(new uint32_t[key_words * kChunk]);
    values.reset(new uint32_t[kChunk * sizeof(T) / 4 * padded_dim]());
    weights.reset(new uint32_t[lines * kChunk * sizeof(T) / 4]);
    scores.reset(new float[lines * kChunk]);
    out.reset(new float[lines * padded_dim]);
    top.reset(new float[lines]);
    total.reset(new float[lines]);
    rescale.reset(new float[lines]);
  }
};

// Sixteen keys (or fewer, up to the end of the block or of the row) as columns `at` .. `at` + 15 of the key operand.
template <class T>
void place_keys(Scratch<T>& s, const T* const* rows, int64_t at) {
  int64_t full = s.key_words / kLanes * kLanes;
  for (int64_t w = 0; w < full; w += kLanes) {
    Words m[kLanes];
    for (int i = 0; i < kLanes; i++)
      m[i] = load_words(reinterpret_cast<const uint32_t*>(rows[i]) + w);
    transpose(m);
    for (int i = 0; i < kLanes; i++) *reinterpret_cast<Words*>(&s.keys[(w + i) * kChunk + at]) = m[i];
  }
  for (int64_t w = full; w < s.key_words; w++)
    for (int i = 0; i < kLanes; i++)
      s.keys[w * kChunk + at + i] = reinterpret_cast<const uint32_t*>(rows[i])[w];
}

INLINE void place_values(Scratch<float>& s, const float* const* rows, int64_t at, int64_t dim) {
  for (int i = 0; i < kLanes; i++) std::memcpy(&s.values[(at + i) * s.padded_dim], rows[i], dim * 4);
}

INLINE void place_values(Scratch<bf16>& s, const bf16* const* rows, int64_t at, int64_t dim) {
  for (int i = 0; i < kLanes; i += 2) {
    uint32_t* target = &s.values[(at + i) / 2 * s.padded_dim];
    int64_t d = 0;
#ifdef __AVX512BW__
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) interleave(rows[i] + d, rows[i + 1] + d, target + d);
#endif
    for (; d + kLanes <= dim; d += kLanes)
      *reinterpret_cast<Words*>(target + d) =
          __builtin_convertvector(*reinterpret_cast<const Halves*>(rows[i] + d), Words) |
          __builtin_convertvector(*reinterpret_cast<const Halves*>(rows[i + 1] + d), Words) << 16;
    for (; d < dim; d++) target[d] = rows[i][d].bits | uint32_t(rows[i + 1][d].bits) << 16;
  }
}

// Scores of a line's chunk to weights; the running maximum and total follow. `from` .. `to`: the keys it attends to.
template <class T>
INLINE void soften(Scratch<T>& s, int64_t line, int64_t from, int64_t to, const Shape& shape) {
  float* scores = &s.scores[line * kChunk];
  T* weights = reinterpret_cast<T*>(s.weights.get()) + line * kChunk;
  if (to <= from) {  // nothing of this chunk
    s.rescale[line] = 1.0f;
    std::memset((void*)weights, 0, kChunk * sizeof(T));
    return;
  }
  Floats held[kVectors];
  Floats peak = floats(-INFINITY);
  for (int v = 0; v < kVectors; v++) {
    held[v] = load(scores + v * kLanes) * shape.scale;
    if (shape.soft_cap != 0.0f) held[v] = shape.soft_cap * tangent(held[v] / shape.soft_cap);
    if (from > v * kLanes || to < (v + 1) * kLanes) {
      Ints key = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + v * kLanes;
      held[v] = choose((key >= int32_t(from)) & (key < int32_t(to)), held[v], floats(-INFINITY));
    }
    peak = larger(peak, held[v]);
  }
  float top = std::max(s.top[line], largest(peak));
  float base = std::isfinite(top) ? top : 0.0f;
  float rescale = 1.0f;
  if (top != s.top[line]) rescale = std::isfinite(s.top[line]) ? std::exp(s.top[line] - base) : 0.0f;
  Floats total{};
  for (int v = 0; v < kVectors; v++) {
    Floats weight = exponential(held[v] - base);
    store(weights + v * kLanes, weight);
    total += weight;
  }
  s.total[line] = s.total[line] * rescale + sum(total);
  s.top[line] = top;
  s.rescale[line] = rescale;
}

// Rows that stand for keys outside a chunk: zero, so that a weight of zero makes nothing of them.
alignas(64) constexpr uint8_t kNothing[4 * kMostDim] = {};

// Where the keys and values of one chunk lie; those outside `begin` .. `end` are never touched.
template <class T>
struct Places {
  const T *keys[kChunk], *values[kChunk];

  void find(const T* kv, const int32_t* table, int64_t chunk, int64_t begin, int64_t end, int64_t head,
                   const Shape& shape) {
    int64_t block = chunk / shape.slots, slot = chunk % shape.slots;
    const T* nothing = reinterpret_cast<const T*>(kNothing);
    for (int i = 0; i < kChunk;) {
      int64_t run = std::min<int64_t>(shape.slots - slot, kChunk - i);
      bool whole = chunk + i >= begin && chunk + i + run <= end;
      const T* row = nullptr;
      if (whole || (chunk + i + run > begin && chunk + i < end))
        row = kv + table[block] * shape.block_stride + head * shape.head_stride + slot * shape.dim;
      for (int64_t k = 0; k < run; k++, i++) {
        bool read = row && (whole || (chunk + i >= begin && chunk + i < end));
        keys[i] = read ? row + k * shape.dim : nothing;
        values[i] = read ? keys[i] + shape.part_stride : nothing;
      }
      slot = 0;
      block++;
    }
  }

  // Into the second-level cache: it takes more requests at a time than the first, and more fit.
  void prefetch(int i, int64_t dim) const {
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(keys[i] + d, 0, 2);
      __builtin_prefetch(values[i] + d, 0, 2);
    }
  }
};

// A few lines' scores and weighted values without putting keys and values in order first: for decodes, which use each
// of them for the one group only.
template <int Step>
INLINE void fold(Floats* x) {
  for (int i = 0; i < Step; i++) {
    Words a = (Words)x[i], b = (Words)x[i + Step];
    if (Step == 8)
      x[i] = (Floats)PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             (Floats)PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    else if (Step == 4)
      x[i] = (Floats)PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
             (Floats)PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    else if (Step == 2)
      x[i] = (Floats)PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
             (Floats)PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    else
      x[i] = (Floats)PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
             (Floats)PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

template <class T>
INLINE void few_scores(const Scratch<T>& s, int64_t line, const T* const* keys, const Places<T>& following,
                       int64_t dim) {
  const uint32_t* query = &s.query[line * s.key_words];
  for (int v = 0; v < kVectors; v++) {
    Floats sums[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const uint32_t* key = reinterpret_cast<const uint32_t*>(keys[v * kLanes + i]);
      // The next chunk's rows come while this one is computed, a few at a time: blocks lie anywhere, so no hardware
      // foresees them, and a burst of requests would only stall.
      if (line == 0) following.prefetch(v * kLanes + i, dim);
      sums[i] = Floats{};
      for (int64_t w = 0; w < s.key_words; w += kLanes)
        sums[i] = multiply_add(sums[i], load_words(query + w), load_words(key + w), (const T*)nullptr);
    }
    fold<8>(sums);
    fold<4>(sums);
    fold<2>(sums);
    fold<1>(sums);
    store(&s.scores[line * kChunk + v * kLanes], sums[0]);
  }
}

// Two values side by side, 32 numbers of them, as the operand's words.
INLINE void pair_up(const float* first, const float*, Words* out) {
  out[0] = load_words(first);
  out[1] = load_words(first + kLanes);
}
INLINE void pair_up(const bf16* first, const bf16* second, Words* out) {
#ifdef __AVX512BW__
  interleave(first, second, reinterpret_cast<uint32_t*>(out));
#else
  for (int i = 0; i < 2; i++)
    out[i] = __builtin_convertvector(*reinterpret_cast<const Halves*>(first + i * kLanes), Words) |
             __builtin_convertvector(*reinterpret_cast<const Halves*>(second + i * kLanes), Words) << 16;
#endif
}

template <class T, int Rows>
INLINE void few_values(Scratch<T>& s, int64_t line, const T* const* values, int64_t dim) {
  constexpr int step = 4 / sizeof(T);  // keys of one word
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    Floats acc[Rows][2];
    for (int r = 0; r < Rows; r++)
      for (int v = 0; v < 2; v++)
        acc[r][v] = load(&s.out[(line + r) * s.padded_dim + d + v * kLanes]) * s.rescale[line + r];
    for (int k = 0; k < kChunk; k += step) {
      Words both[2];
      pair_up(values[k] + d, values[k + step - 1] + d, both);
      for (int r = 0; r < Rows; r++) {
        Words weight = words(s.weights[(line + r) * (kChunk / step) + k / step]);
        for (int v = 0; v < 2; v++) acc[r][v] = multiply_add(acc[r][v], weight, both[v], (const T*)nullptr);
      }
    }
    for (int r = 0; r < Rows; r++)
      for (int v = 0; v < 2; v++) store(&s.out[(line + r) * s.padded_dim + d + v * kLanes], acc[r][v]);
  }
}

template <class T>
INLINE void few_values(Scratch<T>& s, int64_t lines, const T* const* values, int64_t dim) {
  for (int64_t line = 0; line < lines; line += 4) switch (lines - line) {
      case 1: few_values<T, 1>(s, line, values, dim); break;
      case 2: few_values<T, 2>(s, line, values, dim); break;
      case 3: few_values<T, 3>(s, line, values, dim); break;
      default: few_values<T, 4>(s, line, values, dim); break;
    }
}

template <class T>
void attend(const T* q, const T* kv, const Batch& batch, const Tile& tile, int64_t head, const Shape& shape,
            Scratch<T>& s, T* out, float* lse) {
  int64_t group = shape.group, dim = shape.dim, value_dim = shape.value_dim, lines = (tile.end - tile.begin) * group;
  int64_t first_token = batch.offsets[tile.row] + tile.begin, first = batch.starts[tile.row] + tile.begin;
  int64_t last = batch.starts[tile.row] + tile.end;  // one past the last key that anybody attends to
  const int32_t* table = batch.tables + tile.row * batch.table_width;
  for (int64_t line = 0; line < lines; line++) {
    const T* source = q + (first_token + line / group) * shape.q_stride + (head * group + line % group) * dim;
    std::memcpy(&s.query[line * s.key_words], source, dim * sizeof(T));
    s.top[line] = -INFINITY;
    s.total[line] = 0;
  }
  std::memset(s.out.get(), 0, lines * s.padded_dim * sizeof(float));
  int64_t begin_key = shape.window ? std::max<int64_t>(0, first - shape.window + 1) : 0;
  bool few = lines <= kFewLines && dim % (2 * kLanes) == 0 && value_dim % (2 * kLanes) == 0;
  Places<T> places, following;
  following.find(kv, table, begin_key / kChunk * kChunk, begin_key, last, head, shape);
  for (int64_t chunk = begin_key / kChunk * kChunk; chunk < last; chunk += kChunk) {
    places = following;
    if (chunk + kChunk < last) following.find(kv, table, chunk + kChunk, begin_key, last, head, shape);
    if (few) {
      for (int64_t line = 0; line < lines; line++) few_scores(s, line, places.keys, following, dim);
    } else {
      for (int64_t at = 0; at < kChunk; at += kLanes) {
        for (int i = 0; i < kLanes; i++) following.prefetch(int(at) + i, dim);
        place_keys(s, places.keys + at, at);
        place_values(s, places.values + at, at, value_dim);
      }
      small_products<T>(lines, s.query.get(), s.key_words, s.keys.get(), kChunk, s.key_words, s.scores.get(), kChunk,
                        nullptr);
    }
    for (int64_t line = 0; line < lines; line++) {
      int64_t position = first + line / group;
      int64_t from = shape.window ? std::max<int64_t>(position - shape.window + 1 - chunk, 0) : 0;
      soften(s, line, from, std::min<int64_t>(position + 1 - chunk, kChunk), shape);
    }
    int64_t pair = sizeof(T) == 2 ? 2 : 1;
    if (few) few_values(s, lines, places.values, value_dim);
    for (int64_t d = 0; d < value_dim && !few; d += kChunk)
      small_products<T>(lines, s.weights.get(), kChunk / pair, &s.values[d], s.padded_dim, kChunk / pair, &s.out[d],
                        s.padded_dim, s.rescale.get());
  }
  int64_t heads = shape.kv_heads * group;
  for (int64_t line = 0; line < lines; line++) {
    int64_t place = (first_token + line / group) * heads + head * group + line % group;
    float factor = s.total[line] == 0 ? 0.0f : 1.0f / s.total[line];
    for (int64_t d = 0; d < value_dim; d += kLanes)
      store_part(out + place * value_dim + d, load(&s.out[line * s.padded_dim + d]) * factor,
                 int(std::min<int64_t>(kLanes, value_dim - d)));
    if (lse) lse[place] = s.total[line] == 0 ? -INFINITY : s.top[line] + std::log(s.total[line]);
  }
}

template <class T>
void attention(const T* q, const T* kv, const Batch& batch, const Shape& shape, int64_t most_tokens, T* out,
               float* lse) {
  int64_t tasks = batch.num_tiles * shape.kv_heads;
#pragma omp parallel if (tasks > 1)
  {
    Scratch<T> scratch(most_tokens * shape.group, shape.dim, shape.value_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      attend(q, kv, batch, batch.tiles[task / shape.kv_heads], task % shape.kv_heads, shape, scratch, out, lse);
  }
}

}  // namespace

extern "C" {
void penstock_attention_f32(const float* q, const float* kv, const Batch* batch, const Shape* shape, int64_t most,
                            float* out, float* lse) {
  attention(q, kv, *batch, *shape, most, out, lse);
}
void penstock_attention_bf16(const bf16* q, const bf16* kv, const Batch* batch, const Shape* shape, int64_t most,
                             bf16* out, float* lse) {
  attention(q, kv, *batch, *shape, most, out, lse);
}
}
