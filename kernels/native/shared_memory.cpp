// Sums, joins and exchanges among processes that map the same memory. Called through shared_memory.py.
//
// The memory begins with one line of counters for each rank; then come two buffers for each rank, used in turns. In
// turn n a rank writes its buffer n % 2, says so by `arrived` = n, reads what others wrote, and says so by `done` = n.
// It writes that buffer again in turn n + 2, once all ranks are done with turn n. All ranks take the same turns.
#include <poll.h>
#include <sched.h>
#include <time.h>

#include <atomic>

#include "vectors.h"

namespace {

constexpr int kPauses = 2000;              // tens of microseconds, the usual difference between ranks
constexpr int64_t kYieldNs = 2'000'000;    // then others may run; longer waits sleep in between
constexpr int64_t kSleepNs = 50'000;
constexpr int64_t kLookNs = 10'000'000;    // between looks at whether peers are alive
constexpr int64_t kScatterBytes = 64 << 10;  // from here on each of several ranks sums a part and reads the others'

enum Outcome : int64_t { kFine = 0, kLate = 1, kLeft = 2, kEnded = 3, kOther = 4 };

struct Line {
  std::atomic<uint64_t> arrived, reduced, done, left;
  std::atomic<uint64_t> call[2];  // what the rank does in a turn, to be compared
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "counters are shared between processes");

struct Exchange {
  char* base;
  int64_t rank, width, capacity;
  int64_t line_bytes;  // the counters, then a number of bytes for each rank
  uint64_t turn;
  int64_t timeout_ns;
  const int* processes;  // a pidfd for each rank, negative for none
  int64_t culprit;       // rank at fault in an outcome other than kFine

  Line& line(int64_t of) const { return *reinterpret_cast<Line*>(base + of * line_bytes); }
  int64_t* sizes(int64_t of) const { return reinterpret_cast<int64_t*>(base + of * line_bytes + sizeof(Line)); }
  char* buffer(int64_t of) const { return base + width * line_bytes + (of * 2 + int64_t(turn % 2)) * capacity; }
};

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000ll + time.tv_nsec;
}

INLINE void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t fault(Exchange& x, int64_t rank, Outcome outcome) {
  x.culprit = rank;
  return outcome;
}

// Whether any peer has left the group or ended.
int64_t look(Exchange& x) {
  for (int64_t peer = 0; peer < x.width; peer++) {
    if (x.line(peer).left.load(std::memory_order_acquire)) return fault(x, peer, kLeft);
    pollfd process{x.processes[peer], POLLIN, 0};
    if (x.processes[peer] >= 0 && poll(&process, 1, 0) > 0) return fault(x, peer, kEnded);
  }
  return kFine;
}

int64_t wait(Exchange& x, int64_t peer, const std::atomic<uint64_t>& counter, uint64_t target) {
  for (int i = 0; i < kPauses; i++) {
    if (counter.load(std::memory_order_acquire) >= target) return kFine;
    pause();
  }
  int64_t began = now(), looked = began;
  while (counter.load(std::memory_order_acquire) < target) {
    int64_t time = now();
    if (time - looked > kLookNs) {
      looked = time;
      int64_t found = look(x);
      // A peer may have done its part before it went.
      if (found && counter.load(std::memory_order_acquire) < target) return found;
      if (time - began > x.timeout_ns) return fault(x, peer, kLate);
    }
    timespec sleep{0, kSleepNs};
    if (time - began > kYieldNs)
      nanosleep(&sleep, nullptr);
    else
      sched_yield();
  }
  return kFine;
}

// Begins the next turn: afterwards this rank's buffer may be written.
int64_t begin(Exchange& x) {
  x.turn++;
  for (int64_t peer = 0; x.turn > 2 && peer < x.width; peer++)
    if (int64_t found = wait(x, peer, x.line(peer).done, x.turn - 2)) return found;
  return kFine;
}

// Says that this rank's buffer is written; `call` tells kind and size.
void arrive(Exchange& x, uint64_t call) {
  Line& own = x.line(x.rank);
  own.call[x.turn % 2].store(call, std::memory_order_relaxed);
  own.arrived.store(x.turn, std::memory_order_release);
}

// Waits for one rank's buffer; it must have made the same call.
int64_t expect(Exchange& x, int64_t peer, uint64_t call) {
  if (int64_t found = wait(x, peer, x.line(peer).arrived, x.turn)) return found;
  if (x.line(peer).call[x.turn % 2].load(std::memory_order_relaxed) != call) return fault(x, peer, kOther);
  return kFine;
}

int64_t expect_all(Exchange& x, uint64_t call) {
  for (int64_t peer = 0; peer < x.width; peer++)
    if (int64_t found = expect(x, peer, call)) return found;
  return kFine;
}

void finish(Exchange& x) { x.line(x.rank).done.store(x.turn, std::memory_order_release); }

uint64_t call_of(uint64_t kind, int64_t size) { return kind << 56 | uint64_t(size); }

// Sums of narrow floats are kept in float32 and rounded once; the order is that of the ranks, for every element.
template <class T>
void sum(const Exchange& x, int64_t from, int64_t to, T* out) {
  for (int64_t i = from; i < to; i++) {
    T total = reinterpret_cast<const T*>(x.buffer(0))[i];
    for (int64_t peer = 1; peer < x.width; peer++) total += reinterpret_cast<const T*>(x.buffer(peer))[i];
    out[i] = total;
  }
}
template <class T>
void sum_floats(const Exchange& x, int64_t from, int64_t to, T* out) {
  for (int64_t i = from; i < to; i += kLanes) {
    int count = int(std::min<int64_t>(kLanes, to - i));
    Floats total = load_part(reinterpret_cast<const T*>(x.buffer(0)) + i, count);
    for (int64_t peer = 1; peer < x.width; peer++)
      total += load_part(reinterpret_cast<const T*>(x.buffer(peer)) + i, count);
    store_part(out + i, total, count);
  }
}
template <>
void sum<float>(const Exchange& x, int64_t from, int64_t to, float* out) { sum_floats(x, from, to, out); }
template <>
void sum<bf16>(const Exchange& x, int64_t from, int64_t to, bf16* out) { sum_floats(x, from, to, out); }

template <class T>
int64_t all_reduce(Exchange& x, T* data, int64_t count) {
  int64_t most = x.capacity / int64_t(sizeof(T));
  for (int64_t done = 0; done < count; done += most) {
    int64_t own = std::min(most, count - done);
    uint64_t call = call_of(1 + sizeof(T), own);
    if (int64_t found = begin(x)) return found;
    std::memcpy(x.buffer(x.rank), data + done, own * sizeof(T));
    arrive(x, call);
    if (int64_t found = expect_all(x, call)) return found;
    if (x.width == 2 || own * int64_t(sizeof(T)) <= kScatterBytes) {
      sum(x, 0, own, data + done);
    } else {
      // Nobody but rank r reads part r of any buffer before it is summed, so the sum may stand there.
      auto edge = [&](int64_t rank) { return own * rank / x.width; };
      sum(x, edge(x.rank), edge(x.rank + 1), reinterpret_cast<T*>(x.buffer(x.rank)));
      x.line(x.rank).reduced.store(x.turn, std::memory_order_release);
      for (int64_t peer = 0; peer < x.width; peer++) {
        if (int64_t found = wait(x, peer, x.line(peer).reduced, x.turn)) return found;
        std::memcpy(data + done + edge(peer), reinterpret_cast<T*>(x.buffer(peer)) + edge(peer),
                    (edge(peer + 1) - edge(peer)) * sizeof(T));
      }
    }
    finish(x);
  }
  return kFine;
}

// Copies bytes [from, to) of a part made of rows into every `stride` bytes of `out`.
void spread(const char* part, int64_t from, int64_t to, int64_t row_bytes, char* out, int64_t stride) {
  while (from < to) {
    int64_t row = from / row_bytes, end = std::min(to, (row + 1) * row_bytes);
    std::memcpy(out + row * stride + from % row_bytes, part, end - from);
    part += end - from;
    from = end;
  }
}

// Joins the ranks' parts of `rows` rows side by side; `joined` is null where it is not wanted.
int64_t gather(Exchange& x, const char* part, int64_t rows, int64_t row_bytes, char* joined) {
  int64_t bytes = rows * row_bytes;
  for (int64_t done = 0; done < bytes; done += x.capacity) {
    int64_t own = std::min(x.capacity, bytes - done);
    uint64_t call = call_of(16, own);
    if (int64_t found = begin(x)) return found;
    std::memcpy(x.buffer(x.rank), part + done, own);
    arrive(x, call);
    for (int64_t peer = 0; joined != nullptr && peer < x.width; peer++) {
      if (int64_t found = expect(x, peer, call)) return found;
      spread(x.buffer(peer), done, done + own, row_bytes, joined + peer * row_bytes, x.width * row_bytes);
    }
    finish(x);
  }
  return kFine;
}

int64_t broadcast(Exchange& x, char* data, int64_t bytes, int64_t source) {
  for (int64_t done = 0; done < bytes; done += x.capacity) {
    int64_t own = std::min(x.capacity, bytes - done);
    uint64_t call = call_of(17, own);
    if (int64_t found = begin(x)) return found;
    if (x.rank == source) std::memcpy(x.buffer(x.rank), data + done, own);
    arrive(x, call);
    if (int64_t found = expect(x, source, call)) return found;
    if (x.rank != source) std::memcpy(data + done, x.buffer(source), own);
    finish(x);
  }
  return kFine;
}

// Every rank's bytes for rank 0, then for rank 1, and so on, go where they belong. Turns: as many as the largest needs.
int64_t all_to_all(Exchange& x, const char* sent, const int64_t* send, char* received, const int64_t* receive) {
  int64_t turns = 1, total = 0;
  for (int64_t peer = 0; peer < x.width; peer++) total += send[peer];
  for (int64_t turn = 0; turn < turns; turn++) {
    int64_t from = turn * x.capacity, own = std::max<int64_t>(0, std::min(x.capacity, total - from));
    uint64_t call = call_of(18, turn);
    if (int64_t found = begin(x)) return found;
    // The sizes stay in place until all ranks are done with the last turn but one, hence one more turn at the end.
    if (turn == 0) std::copy(send, send + x.width, x.sizes(x.rank));
    if (own) std::memcpy(x.buffer(x.rank), sent + from, own);
    arrive(x, call);
    char* out = received;
    for (int64_t peer = 0; peer < x.width; peer++) {
      if (int64_t found = expect(x, peer, call)) return found;
      const int64_t* sizes = x.sizes(peer);
      int64_t first = 0, all = 0;
      for (int64_t rank = 0; rank < x.width; rank++) {
        if (rank < x.rank) first += sizes[rank];
        all += sizes[rank];
      }
      if (sizes[x.rank] != receive[peer]) return fault(x, peer, kOther);
      turns = std::max(turns, (all + x.capacity - 1) / x.capacity);
      int64_t begins = std::max(first, from), ends = std::min(first + receive[peer], from + x.capacity);
      if (begins < ends) std::memcpy(out + begins - first, x.buffer(peer) + begins - from, ends - begins);
      out += receive[peer];
    }
    finish(x);
  }
  // Wait for all, so that the sizes may be written again.
  for (int64_t peer = 0; peer < x.width; peer++)
    if (int64_t found = wait(x, peer, x.line(peer).done, x.turn)) return found;
  return kFine;
}

int64_t barrier(Exchange& x) {
  uint64_t call = call_of(19, 0);
  if (int64_t found = begin(x)) return found;
  arrive(x, call);
  if (int64_t found = expect_all(x, call)) return found;
  finish(x);
  return kFine;
}

}  // namespace

extern "C" {
int64_t penstock_shared_sum_f32(Exchange* x, void* data, int64_t n) { return all_reduce(*x, (float*)data, n); }
int64_t penstock_shared_sum_bf16(Exchange* x, void* data, int64_t n) { return all_reduce(*x, (bf16*)data, n); }
int64_t penstock_shared_sum_f64(Exchange* x, void* data, int64_t n) { return all_reduce(*x, (double*)data, n); }
int64_t penstock_shared_sum_i64(Exchange* x, void* data, int64_t n) { return all_reduce(*x, (int64_t*)data, n); }
int64_t penstock_shared_gather(Exchange* x, const void* part, int64_t rows, int64_t row_bytes, void* joined) {
  return gather(*x, (const char*)part, rows, row_bytes, (char*)joined);
}
int64_t penstock_shared_broadcast(Exchange* x, void* data, int64_t bytes, int64_t source) {
  return broadcast(*x, (char*)data, bytes, source);
}
int64_t penstock_shared_all_to_all(Exchange* x, const void* sent, const int64_t* send, void* received,
                                   const int64_t* receive) {
  return all_to_all(*x, (const char*)sent, send, (char*)received, receive);
}
int64_t penstock_shared_barrier(Exchange* x) { return barrier(*x); }
int64_t penstock_shared_leave(Exchange* x) {
  x->line(x->rank).left.store(1, std::memory_order_release);
  return kFine;
}
}
