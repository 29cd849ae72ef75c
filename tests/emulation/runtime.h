// Runs a CUDA kernel on the CPU: every thread of the grid is a fiber of one OS thread, which runs
// until it waits. What a kernel calls (vocabulary.h, primitives.h) is built on the functions here.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace rnn_fused::emulation {

// Where in the kernel's source a thread is.
using Place = std::source_location;

inline std::ostream& operator<<(std::ostream& out, Place place) {
  return out << place.file_name() << ':' << place.line();
}

inline std::ostream& operator<<(std::ostream& out, uint3 v) {
  return out << '(' << v.x << ", " << v.y << ", " << v.z << ')';
}

template <class... Part>
std::string text(const Part&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A mistake of the kernel. Names the places.
struct Error : std::runtime_error {
  template <class... Part>
  explicit Error(const Part&... parts) : std::runtime_error(text(parts...)) {}
};

// In which order the threads run: with 0 always the same, with any other seed one of its own.
void set_seed(uint64_t seed);

// Which blocks of a launch run at the same time: all, or those of a cluster, so many neighbours in
// x.
struct Together {
  bool all = false;
  unsigned cluster = 1;
};

// Runs `thread` as every thread of the grid. What does not run together runs one after the other,
// so that a block which waits for another one is an endless spin here. Throws Error, or what a
// thread threw, as soon as there is a mistake, and abandons the other threads where they are.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Together together,
              const std::function<void()>& thread);

// ---------------------------------------------------------------------------------------------
// For the thread that is running
// ---------------------------------------------------------------------------------------------

unsigned lane();

// The launch's shared memory, and this block's copy of the static variable that `key` stands for.
// Both are NaN at first.
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

// Throws unless the bytes are this block's shared memory, aligned.
void check_shared(const void* p, size_t bytes, size_t alignment, Place place);

void block_barrier(Place place);
void grid_barrier(Place place);
void warp_barrier(uint32_t mask, Place place);  // orders memory

// The block's number in its cluster, and the cluster's blocks.
unsigned cluster_rank();
unsigned cluster_size();

// The halves of a barrier of the cluster. What happens between them is not ordered.
void cluster_arrive(Place place);
void cluster_wait(Place place);

// What lies in the shared memory of another block of the cluster where p lies in this one's; and
// that the bytes at such an address are shared memory, aligned, of a block that has begun and not
// left.
unsigned char* shared_of(const void* p, unsigned rank, Place place);
void check_shared_of_cluster(const void* p, size_t bytes, Place place);

// Transaction barriers, known by their address.
void make_barrier(const void* barrier, unsigned arrivals, Place place);
void expect_bytes(const void* barrier, size_t bytes, Place place);
// 16 bytes arrive at `to` when somebody next asks whether the phase has ended, as late as can be.
void send(const void* barrier, void* to, const void* bytes, Place place);
bool phase_ended(const void* barrier, unsigned parity, Place place);

// Lets those that can run do so before this thread goes on.
void pause();

// Waits for something: goes on when others cannot, or sometimes before. Where all threads do
// nothing else, the run ends with an Error.
void spin(Place place);

// Something changed that a spinning thread may wait for.
void note_progress();

constexpr size_t kExchangeBytes = 32;

// Meets the other lanes of the mask and returns what each of them brought, kExchangeBytes a lane,
// valid until the lane's next exchange. Orders no memory: registers move, as in a shuffle.
const unsigned char* exchange_bytes(uint32_t mask, const void* mine, size_t bytes, Place place);

// What the lanes of a warp brought to an exchange.
template <class T>
class Lanes {
 public:
  Lanes(const unsigned char* bytes, uint32_t mask, Place place)
      : bytes_(bytes), mask_(mask), place_(place) {}

  const T& operator[](unsigned lane) const {
    if (!(mask_ >> lane & 1))
      throw Error("lane ", lane, ", which is not in the mask, is read at ", place_);
    return *reinterpret_cast<const T*>(bytes_ + lane * kExchangeBytes);
  }

 private:
  const unsigned char* bytes_;
  uint32_t mask_;
  Place place_;
};

template <class T>
Lanes<T> exchange(uint32_t mask, const T& mine, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kExchangeBytes);
  return {exchange_bytes(mask, &mine, sizeof(T), place), mask, place};
}

// The cp.async of one thread. A copy reads its source at once and again when it is waited for, and
// its target is NaN in between: the hardware may copy at any time from the issue to the wait, so
// that a reader who is too early, an owner who still reads the old value, and a source that changes
// are all mistakes.
class AsyncCopies {
 public:
  void add(void* to, const void* from, size_t bytes, bool valid, Place place) {
    Copy copy = {to, valid ? from : nullptr, bytes, place, {}};
    if (valid) std::memcpy(copy.bits, from, bytes);
    std::memset(to, 0xff, bytes);
    groups_.back().push_back(copy);
  }

  void commit() { groups_.emplace_back(); }

  void wait(size_t keep) {
    if (groups_.size() > keep + 1) pause();  // now the others may read the target, or write
    for (; groups_.size() > keep + 1; groups_.pop_front())  // the last one is still open
      for (const Copy& copy : groups_.front()) finish(copy);
  }

 private:
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
    Place place;
    unsigned char bits[16];  // of the source, when the copy was issued
  };

  static void finish(const Copy& copy) {
    if (copy.from && std::memcmp(copy.from, copy.bits, copy.bytes) != 0)
      throw Error("the source of cp.async changed before the wait; issued at ", copy.place);
    std::memcpy(copy.to, copy.bits, copy.bytes);
  }

  std::deque<std::vector<Copy>> groups_{1};
};

AsyncCopies& async_copies();

}  // namespace rnn_fused::emulation
