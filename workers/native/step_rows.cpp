// The rows of one step, gathered from the columns of a worker's sequence table. Called by scheduler/native_rows.py;
// what the columns mean, and the same in numpy, is in scheduler/table.py and scheduler/row_layout.py.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr uint8_t kDecode = 2;                                 // State.DECODE
constexpr int64_t kComputed = 0, kLastToken = 2;               // rows of `fields`
constexpr int64_t kMoreColumns = 16;

struct Table {  // by slot
  const uint8_t* state;
  const int32_t* fields;  // [num_fields, max_seqs]
  const uint64_t* seed;
  const int32_t* tokens;  // [max_seqs, max_length]
  const int32_t* block_tables;  // [max_seqs, table_width]
  const int64_t* version;
  int64_t max_seqs, num_fields, max_length, table_width, block_size;
};

struct Layout {  // by row, as the last step left it
  int64_t* slots;
  int32_t* tables;
  int64_t* versions;
  uint8_t* wanted;  // scratch, by slot
  int64_t* movers;  // scratch
  int64_t num_rows, width;
};

// The decoding slots in the order of their rows; those without a row fill the holes, then the end.
int64_t order(const Table& table, Layout& layout, int64_t* slots) {
  int64_t count = 0;
  for (int64_t slot = 0; slot < table.max_seqs; ++slot) count += layout.wanted[slot] = table.state[slot] == kDecode;
  const int64_t before = std::min(count, layout.num_rows);
  for (int64_t row = 0; row < before; ++row) {
    const int64_t slot = layout.slots[row];
    slots[row] = layout.wanted[slot] ? slot : -1;
    layout.wanted[slot] = 0;
  }
  int64_t movers = 0;
  for (int64_t row = before; row < layout.num_rows; ++row) {
    const int64_t slot = layout.slots[row];
    if (layout.wanted[slot]) layout.movers[movers++] = slot;
    layout.wanted[slot] = 0;
  }
  for (int64_t slot = 0; slot < table.max_seqs; ++slot)
    if (layout.wanted[slot]) layout.movers[movers++] = slot;
  const int64_t* mover = layout.movers;
  for (int64_t row = 0; row < count; ++row)
    if (row >= before || slots[row] < 0) slots[row] = *mover++;
  return count;
}

// Copy the block tables of rows whose slot, or whose slot's table, has changed.
void lay_out(const Table& table, Layout& layout, const int64_t* slots, int64_t rows, int64_t width) {
  if (width > layout.width) {
    layout.width = std::min(width + kMoreColumns, table.table_width);
    std::fill_n(layout.versions, table.max_seqs, -1);
  }
  for (int64_t row = 0; row < rows; ++row) {
    layout.slots[row] = slots[row];
    if (layout.versions[row] == table.version[slots[row]]) continue;
    layout.versions[row] = table.version[slots[row]];
    std::memcpy(layout.tables + row * table.table_width, table.block_tables + slots[row] * table.table_width,
                layout.width * sizeof(int32_t));
  }
  layout.num_rows = rows;
}

}  // namespace

// `chunks`: slots, then token counts of the prefill rows. `rows_out`: slots [N] and seeds [N], then as 32 bits slots [N],
// ends [N], offsets [N + 1], fields [num_fields, N] and token_ids. Returns the width of the block tables, or -1 unless `num_decode`
// rows decode: then nothing has changed but scratch.
extern "C" int64_t penstock_gather_rows(const Table* table, Layout* layout, int64_t* rows_out, int64_t num_decode,
                                        const int64_t* chunks, int64_t num_chunks) {
  const int64_t rows = num_decode + num_chunks;
  if (std::count(table->state, table->state + table->max_seqs, kDecode) != num_decode) return -1;
  int64_t *slots = rows_out, *seeds = rows_out + rows;
  int32_t* ints = reinterpret_cast<int32_t*>(rows_out + 2 * rows);
  order(*table, *layout, slots);
  std::copy_n(chunks, num_chunks, slots + num_decode);
  int32_t* ends = ints + rows;
  int32_t* offsets = ends + rows;
  int32_t* fields = offsets + rows + 1;
  int32_t* token_ids = fields + table->num_fields * rows;
  for (int64_t field = 0; field < table->num_fields; ++field) {
    const int32_t* column = table->fields + field * table->max_seqs;
    for (int64_t row = 0; row < rows; ++row) fields[field * rows + row] = column[slots[row]];
  }
  int32_t offset = 0, longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = slots[row];
    const int32_t start = fields[kComputed * rows + row];
    int32_t count = 1;
    if (row < num_decode) {
      token_ids[offset] = fields[kLastToken * rows + row];
    } else {
      count = chunks[num_chunks + row - num_decode];
      std::memcpy(token_ids + offset, table->tokens + slot * table->max_length + start, count * sizeof(int32_t));
    }
    seeds[row] = table->seed[slot];
    ints[row] = slot;
    ends[row] = start + count;
    offsets[row] = offset;
    offset += count;
    longest = std::max(longest, ends[row]);
  }
  offsets[rows] = offset;
  const int64_t width = (longest + table->block_size - 1) / table->block_size;
  lay_out(*table, *layout, slots, rows, width);
  return width;
}
