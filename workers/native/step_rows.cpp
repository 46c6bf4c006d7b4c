// What a step reads of the columns of a worker's sequence table, and what it writes there. Called by
// scheduler/native_rows.py; what the columns mean, and the same in numpy, is in table.py and row_layout.py beside it.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr uint8_t kDecode = 2, kLast = 4;      // State
constexpr uint8_t kStop = 1, kLengthEnd = 2;  // EndReason
constexpr int64_t kComputed = 0, kLength = 1, kLastToken = 2, kPromptLength = 3, kLastPosition = 4;  // of `fields`
constexpr int64_t kMoreColumns = 16;

struct Table {  // by slot
  uint8_t* state;
  int32_t* fields;  // [num_fields, max_seqs]
  const uint64_t* seed;
  int32_t* tokens;              // [max_seqs, max_length]
  const int32_t* block_tables;  // [max_seqs, table_width]
  const int64_t* version;
  const int32_t* capacity;
  const int32_t* min_tokens;
  int64_t max_seqs, num_fields, max_length, table_width, block_size;

  int32_t& at(int64_t field, int64_t slot) const { return fields[field * max_seqs + slot]; }
};

struct Layout {  // by row, as the last step left it
  int64_t* slots;
  int32_t* tables;
  int64_t* versions;
  uint8_t* wanted;  // scratch, by slot
  int64_t* movers;  // scratch
  int64_t num_rows, width;
};

// A step's rows as `penstock_gather_rows` left them, of which `sample_rows` sample; none given: all do.
struct Rows {
  const int64_t* slots;
  int64_t count;
  const int32_t* sample_rows;

  const int32_t* ends() const { return reinterpret_cast<const int32_t*>(slots + 2 * count) + count; }
  const int32_t* fields() const { return ends() + 2 * count + 1; }
  int64_t sampled(int64_t number) const { return sample_rows ? sample_rows[number] : number; }
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

// How many rows decode, and of these, 2^32 times, how many have no room for their token: they go to `full`.
extern "C" int64_t penstock_ready_rows(const Table* table, int64_t* full) {
  int64_t decoding = 0, num_full = 0;
  for (int64_t slot = 0; slot < table->max_seqs; ++slot) {
    if (table->state[slot] != kDecode) continue;
    ++decoding;
    if (table->at(kComputed, slot) == table->capacity[slot]) full[num_full++] = slot;
  }
  return decoding | num_full << 32;
}

// What a step does to its rows whatever it samples.
extern "C" int64_t penstock_advance_rows(const Table* table, const int64_t* slots, int64_t count,
                                         const int32_t* sample_rows, int64_t num_sampled) {
  const Rows rows{slots, count, sample_rows};
  for (int64_t row = 0; row < count; ++row) table->at(kComputed, slots[row]) = rows.ends()[row];
  const int32_t *length = rows.fields() + kLength * count, *last = rows.fields() + kLastPosition * count;
  for (int64_t number = 0; number < num_sampled; ++number) {
    const int64_t row = rows.sampled(number), slot = slots[row];
    table->at(kLength, slot) = length[row] + 1;
    table->state[slot] = length[row] >= last[row] ? kLast : kDecode;
  }
  return 0;
}

// The tokens that a step sampled, stored and judged. `stop_ids` [num_stops, max_seqs]; `starts`, `ends` [num_sampled].
extern "C" int64_t penstock_take_tokens(const Table* table, const int64_t* slots, int64_t count,
                                        const int32_t* sample_rows, int64_t num_sampled, const int32_t* tokens,
                                        const int32_t* stop_ids, int64_t num_stops, int32_t* starts, uint8_t* ends) {
  const Rows rows{slots, count, sample_rows};
  const int32_t* fields = rows.fields();
  for (int64_t number = 0; number < num_sampled; ++number) {
    const int64_t row = rows.sampled(number), slot = slots[row];
    const int32_t token = tokens[number], position = fields[kLength * count + row];
    table->tokens[slot * table->max_length + position] = token;
    table->at(kLastToken, slot) = token;
    starts[number] = position - fields[kPromptLength * count + row];
    bool stopped = false;
    for (int64_t stop = 0; stop < num_stops; ++stop) stopped |= stop_ids[stop * table->max_seqs + slot] == token;
    stopped &= starts[number] >= table->min_tokens[slot];
    ends[number] = stopped ? kStop : position >= fields[kLastPosition * count + row] ? kLengthEnd : 0;
  }
  return 0;
}
