// The matrix products' inner kernel: a few rows times one packed panel of 64 outputs. Used by linear.cpp and moe.cpp.
//
// A panel holds, word by word of the inner dimension, the words of its 64 outputs, so that a step of the inner loop reads
// four whole vectors and the next step's follow in memory. A tile of up to six rows keeps its sums in registers for the
// whole inner dimension, so a row's result never depends on how many others are computed with it.
#pragma once
#include "vectors.h"

constexpr int kVectors = 4;
constexpr int kPanel = kVectors * kLanes;
constexpr int kRows = 6;

template <class T>
constexpr int kPerWord = 4 / sizeof(T);

// Up to kRows rows that begin at `inputs` times one panel, of which `outputs` are stored, rows `y_stride` apart.
template <class T, class Out, int Rows>
INLINE void tile(const T* const* inputs, const uint32_t* panel, int64_t inner_words, const T* bias, Out* y,
                 int64_t y_stride, int outputs) {
  Floats acc[Rows][kVectors];
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < kVectors; v++) acc[r][v] = Floats{};
  const uint32_t* rows[Rows];
  for (int r = 0; r < Rows; r++) rows[r] = reinterpret_cast<const uint32_t*>(inputs[r]);
  for (int64_t k = 0; k < inner_words; k++) {
    Words b[kVectors];
    for (int v = 0; v < kVectors; v++) b[v] = load_words(panel + k * kPanel + v * kLanes);
    __builtin_prefetch(panel + (k + 32) * kPanel);
    __builtin_prefetch(panel + (k + 32) * kPanel + kLanes);
    __builtin_prefetch(panel + (k + 32) * kPanel + 2 * kLanes);
    __builtin_prefetch(panel + (k + 32) * kPanel + 3 * kLanes);
    for (int r = 0; r < Rows; r++) {
      Words a = words(rows[r][k]);
      for (int v = 0; v < kVectors; v++) acc[r][v] = multiply_add(acc[r][v], a, b[v], (const T*)nullptr);
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < kVectors; v++) {
      int count = std::min(outputs - v * kLanes, kLanes);
      if (count <= 0) break;
      Floats out = acc[r][v];
      if (bias) out += load_part(bias + v * kLanes, count);
      store_part(y + r * y_stride + v * kLanes, out, count);
    }
}

// Any number of rows in near-equal tiles: `inputs` are where they begin.
template <class T, class Out>
void panel_product(int64_t rows, const T* const* inputs, const uint32_t* panel, int64_t inner_words, const T* bias,
                   Out* y, int64_t y_stride, int outputs) {
  int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; i++) {
    int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    const T* const* in = inputs + from;
    Out* out = y + from * y_stride;
    switch (to - from) {
      case 1: tile<T, Out, 1>(in, panel, inner_words, bias, out, y_stride, outputs); break;
      case 2: tile<T, Out, 2>(in, panel, inner_words, bias, out, y_stride, outputs); break;
      case 3: tile<T, Out, 3>(in, panel, inner_words, bias, out, y_stride, outputs); break;
      case 4: tile<T, Out, 4>(in, panel, inner_words, bias, out, y_stride, outputs); break;
      case 5: tile<T, Out, 5>(in, panel, inner_words, bias, out, y_stride, outputs); break;
      default: tile<T, Out, 6>(in, panel, inner_words, bias, out, y_stride, outputs); break;
    }
  }
}
