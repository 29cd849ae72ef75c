// Compiled without sanitizers, whatever the kernels have: the scheduler is no part of the program
// that they are to judge. Where it runs in a kernel thread's name it calls no function that TSan
// intercepts (malloc, memcpy), or hides that by Unseen.
#include <sys/mman.h>

#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <utility>

#include "tests/emulation/context.h"
#include "tests/emulation/runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#ifdef RNN_FUSED_EMULATION_TSAN
// At exit TSan would wait a second for the fibers that are kept.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "atexit_sleep_ms=0";
}
#endif

namespace rnn_fused::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved; a page counts when it is touched
constexpr uint64_t kRun = 64;              // choices in turn before a random one, on average
constexpr uint64_t kIdleRounds = 1000;     // of all threads spinning, before it is an endless spin
constexpr uint64_t kRoundsBehind = 100;    // likewise; fewer, or a spin would look endless
constexpr unsigned kBlockThreads = 1024;
constexpr unsigned kClusterBlocks = 16;     // on sm_90, where the device has room
constexpr size_t kSharedBytes = 227 << 10;  // a block's, on sm_90
#ifdef RNN_FUSED_EMULATION_TSAN
constexpr size_t kFibers = kTsanFibers;
#else
constexpr size_t kFibers = 1 << 20;
#endif

enum class State : uint8_t { running, spinning, in_warp, in_block, in_cluster, in_grid, left };

struct Block;

struct Fiber {
  // `index` counts the threads of the block, `slot` those of the launch.
  Fiber(Block* block, unsigned index, size_t slot, void* stack, void (*entry)());

  Block* block;
  uint3 thread;
  unsigned warp, lane;
  AsyncCopies copies;
  size_t slot;
  Context context;
  State state = State::running;
  bool arrived = false;  // at the cluster's barrier, and has not waited there yet
  Place place;           // where it waits
};

// Where `expected` threads wait for each other. Two sets of everything, in turn: a thread may be at
// the next meeting before another has left this one, but never two ahead.
struct Meeting {
  explicit Meeting(unsigned expected) : expected(expected) { waiting.reserve(expected); }

  unsigned expected;
  std::vector<Fiber*> waiting;
  unsigned turn = 0;
  char order[2] = {};  // TSan's names for the two sets

  char* current_order() { return &order[turn]; }
};

// The meetings of one warp's lanes that name the same mask.
struct Exchange : Meeting {
  explicit Exchange(uint32_t mask) : Meeting(__builtin_popcount(mask)) {}
  alignas(kExchangeBytes) unsigned char bytes[2][32][kExchangeBytes];
};

struct SharedVariable {
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;
};

// An mbarrier, and the stores that are on their way to it.
struct TransactionBarrier {
  struct Store {
    unsigned char* to;
    unsigned char bytes[16];
    Place place;
  };

  unsigned arrivals, missing;  // of a phase, and those that this one still waits for
  int64_t bytes = 0;  // that it waits for; below 0 where they come before they are expected
  unsigned phase = 0;
  std::vector<Store> stores;
  char order = 0;  // TSan's name for it

  void end_phase_if_complete() {
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};

SharedVariable nan_bytes(size_t size) {
  SharedVariable variable = {std::unique_ptr<unsigned char[]>(new unsigned char[size]), size};
  std::memset(variable.bytes.get(), 0xff, size);
  return variable;
}

struct Block {
  uint3 index = {};
  unsigned number = 0;  // among those that run together
  unsigned live;        // threads that have not left
  bool begun = false;
  Meeting barrier;
  std::vector<std::map<uint32_t, std::unique_ptr<Exchange>>> warps;  // by mask
  SharedVariable dynamic_shared;
  std::map<const void*, SharedVariable> static_shared;
  std::map<const void*, TransactionBarrier> transactions;

  Block(unsigned threads, size_t shared_bytes)
      : live(threads),
        barrier(threads),
        warps((threads + 31) / 32),
        dynamic_shared(nan_bytes(shared_bytes)) {
    for (unsigned w = 0; w < warps.size(); ++w) {
      const unsigned lanes = std::min(32u, threads - 32 * w);
      const uint32_t all = ~0u >> (32 - lanes);
      warps[w][all] = std::make_unique<Exchange>(all);
    }
  }
};

// Fibers that can go on, in a ring that never allocates.
class Queue {
 public:
  explicit Queue(size_t capacity) : ring_(capacity) {}
  size_t size() const { return size_; }
  void push(Fiber* fiber) { at(size_++) = fiber; }
  void push_front(Fiber* fiber) {
    first_ = (first_ + ring_.size() - 1) % ring_.size();
    ++size_;
    at(0) = fiber;
  }
  // The one at `offset` from the front, whose place the front one takes.
  Fiber* pop(uint64_t offset) {
    std::swap(at(0), at(offset % size_));
    Fiber* fiber = at(0);
    first_ = (first_ + 1) % ring_.size();
    --size_;
    return fiber;
  }

 private:
  Fiber*& at(size_t i) { return ring_[(first_ + i) % ring_.size()]; }

  std::vector<Fiber*> ring_;
  size_t first_ = 0, size_ = 0;
};

bool same(Place a, Place b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

uint3 unravel(size_t i, dim3 extent) {
  return {static_cast<unsigned>(i % extent.x), static_cast<unsigned>(i / extent.x % extent.y),
          static_cast<unsigned>(i / extent.x / extent.y)};
}

size_t volume(dim3 extent) { return size_t{extent.x} * extent.y * extent.z; }

// They end at different lines of their pages: else all would share a few sets of the cache.
size_t stack_bytes(size_t slot) {
  constexpr size_t kLine = 64, kLines = 4096 / kLine;
  return kStackBytes - slot % kLines * kLine;
}

Fiber::Fiber(Block* block, unsigned index, size_t slot, void* stack, void (*entry)())
    : block(block),
      thread(unravel(index, blockDim)),
      warp(index / 32),
      lane(index % 32),
      slot(slot),
      context(stack, stack_bytes(slot), entry, slot,
              text("block ", block->index, " thread ", thread).c_str()) {}

// Stacks of all fibers, one after another.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() { munmap(memory_, bytes_); }
  size_t size() const { return bytes_ / kStackBytes; }
  void* operator[](size_t i) { return static_cast<char*>(memory_) + i * kStackBytes; }

 private:
  void* memory_;
  size_t bytes_;
};

// Those of a launch, kept for the next ones, whose pages are then there. Not under ThreadSanitizer,
// to which the old owner of an address and the new one would be two threads that race.
std::shared_ptr<Stacks> stacks_of(size_t count) {
  static std::shared_ptr<Stacks> kept;
#ifdef RNN_FUSED_EMULATION_TSAN
  kept = nullptr;
#endif
  if (!kept || kept->size() < count) kept = std::make_shared<Stacks>(count);
  return kept;
}

// The threads that are resident together: a cooperative grid, or one cluster or block of another.
class Residents {
 public:
  // `blocks` blocks of the grid, from block `first`.
  Residents(size_t first, size_t blocks, size_t shared_bytes, Together together, uint64_t seed,
            const std::function<void()>& thread);
  Residents(const Residents&) = delete;
  ~Residents() { unseen_.emplace(); }

  void run();

  // For the running fiber.
  Fiber& self() { return *self_; }
  bool cooperative() const { return together_.all; }
  unsigned cluster_size() const { return together_.cluster; }
  // Of the running thread's cluster.
  unsigned cluster_rank() const { return self_->block->number % together_.cluster; }
  Block& of_cluster(unsigned rank) {
    return *blocks_[self_->block->number - cluster_rank() + rank];
  }
  void meet(Meeting& meeting, State state, Place place, bool orders_memory);
  void pause();
  void spin(Place place);
  void note_progress() { idle_ = 0; }
  Meeting& grid_barrier() { return grid_barrier_; }
  Meeting& cluster_barrier() { return cluster_barriers_[self_->block->number / together_.cluster]; }

 private:
  static void entry();
  size_t able() const { return ready_.size() + spinning_.size(); }  // to go on, or to look again
  Fiber* take();
  Fiber& next();
  void switch_away(bool last);
  void check_all_left() const;
  std::string list() const;

  // Around the making and the end of all other members. Blocks that run one after the other must
  // not be ordered by what the host does in between, so the host takes no part in any order there.
  std::optional<Unseen> unseen_{std::in_place};
  const std::function<void()>& thread_;
  Together together_;
  std::mt19937_64 random_;
  bool shuffled_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::shared_ptr<Stacks> stacks_;
  Queue ready_, spinning_;
  Meeting grid_barrier_;
  std::vector<Meeting> cluster_barriers_;
  Context main_;
  Fiber* self_ = nullptr;
  size_t live_;
  uint64_t switches_ = 0;
  uint64_t behind_ = 0;  // number of the block
  uint64_t idle_ = 0;    // times that a thread spun since anything else happened
  Fiber* divergent_[2] = {};
  std::exception_ptr thrown_;
};

// TSan's names for the two orders between the threads of a launch and the host.
char launch_begins, launch_ends;

Residents* residents = nullptr;
uint64_t seed_of_runs = 0;

Residents::Residents(size_t first, size_t blocks, size_t shared_bytes, Together together,
                     uint64_t seed, const std::function<void()>& thread)
    : thread_(thread),
      together_(together),
      random_(seed),
      shuffled_(seed != 0),
      stacks_(stacks_of(blocks * volume(blockDim))),
      ready_(blocks * volume(blockDim)),
      spinning_(blocks * volume(blockDim)),
      grid_barrier_(blocks * volume(blockDim)),
      live_(blocks * volume(blockDim)) {
  const size_t threads = volume(blockDim);
  cluster_barriers_.reserve(blocks / together.cluster);  // TSan knows them by their addresses
  for (size_t c = 0; c < blocks / together.cluster; ++c)
    cluster_barriers_.emplace_back(together.cluster * threads);
  for (size_t b = 0; b < blocks; ++b) {
    blocks_.push_back(std::make_unique<Block>(threads, shared_bytes));
    blocks_[b]->index = unravel(first + b, gridDim);
    blocks_[b]->number = b;
    for (size_t t = 0; t < threads; ++t) {
      void* const stack = (*stacks_)[b * threads + t];
      const size_t slot = (first + b) * threads + t;
      fibers_.push_back(std::make_unique<Fiber>(blocks_[b].get(), t, slot, stack, entry));
      ready_.push(fibers_.back().get());
    }
  }
  unseen_.reset();
}

void Residents::entry() {
  Residents& r = *residents;
  acquire(&launch_begins);
  r.self().context.started(r.main_);
  r.self().block->begun = true;
  try {
    r.thread_();
  } catch (...) {
    if (!r.thrown_) r.thrown_ = std::current_exception();
  }
  r.self().state = State::left;
  --r.self().block->live;
  --r.live_;
  r.note_progress();
  release(&launch_ends);
  r.switch_away(true);
}

// Mostly in turn, so that a warp gets ahead of others, while its stacks are in the cache. Who spins
// looks again when nobody else can go on; in a shuffled launch sometimes before.
Fiber* Residents::take() {
  if (ready_.size() == 0) std::swap(ready_, spinning_);
  if (!shuffled_ || random_() % kRun > 0) return ready_.pop(0);
  const uint64_t i = random_() % able();
  return i < ready_.size() ? ready_.pop(i) : spinning_.pop(i - ready_.size());
}

Fiber& Residents::next() {
  self_ = take();
  // Where others can go on one block falls behind, by some timesteps; then it is another's turn.
  if (shuffled_ && blocks_.size() > 1) {
    if (switches_++ > kRoundsBehind * live_) {
      switches_ = 0;
      behind_ = random_() % blocks_.size();
    }
    for (int i = 0; i < 3 && self_->block->number == behind_; ++i) {
      ready_.push(self_);
      self_ = ready_.pop(random_());
    }
  }
  threadIdx = self_->thread;
  blockIdx = self_->block->index;
  return *self_;
}

// Goes on with a thread that can, or with run() where there is none or something is to be told.
void Residents::switch_away(bool last) {
  Fiber& from = *self_;
  const bool stuck = able() == 0 || idle_ > kIdleRounds * live_;
  const bool stop = stuck || thrown_ || divergent_[0];
  if (stop) return from.context.switch_to(main_, last);
  Fiber& to = next();
  if (&to != &from) from.context.switch_to(to.context, last);
}

void Residents::run() {
  residents = this;
  main_.switch_to(next().context, false);
  residents = nullptr;
  for (const auto& fiber : fibers_)
    if (fiber->state != State::left) fiber->context.abandon(fiber->slot, main_);
  if (thrown_) std::rethrow_exception(thrown_);
  check_all_left();
}

void Residents::check_all_left() const {
  if (divergent_[0])
    throw Error("divergent barrier: one thread waits at ", divergent_[0]->place, ", another at ",
                divergent_[1]->place, "\n", list());
  if (live_ > 0 && able() == 0) throw Error("deadlock: no thread can go on\n", list());
  if (live_ > 0) throw Error("endless spin: no thread makes progress\n", list());
  for (const auto& block : blocks_)
    for (const auto& [address, barrier] : block->transactions)
      if (!barrier.stores.empty())
        throw Error("nobody waited for a store that was on its way; issued at ",
                    barrier.stores[0].place);
}

// What the threads do, one line for all threads of a block that do the same.
std::string Residents::list() const {
  constexpr const char* kWhat[] = {"in the kernel",
                                   "spinning at ",
                                   "in a warp at ",
                                   "in a block barrier at ",
                                   "in a cluster barrier at ",
                                   "in a grid barrier at ",
                                   "no longer in the kernel"};
  std::map<std::pair<size_t, std::string>, int> counts;
  for (const auto& fiber : fibers_) {
    const bool waits = fiber->state != State::running && fiber->state != State::left;
    const char* const what = kWhat[static_cast<int>(fiber->state)];
    const size_t block = fiber->slot / volume(blockDim);
    ++counts[{block, waits ? text(what, fiber->place) : what}];
  }
  std::string lines;
  for (const auto& [group, count] : counts)
    lines += text("  block ", unravel(group.first, gridDim), ": ", count, " threads ", group.second,
                  "\n");
  return lines;
}

void Residents::meet(Meeting& meeting, State state, Place place, bool orders_memory) {
  Fiber& fiber = *self_;
  char* const order = meeting.current_order();
  fiber.state = state;
  fiber.place = place;
  if (!meeting.waiting.empty()) {
    Fiber* const other = meeting.waiting.front();
    if (!same(other->place, place)) {
      divergent_[0] = other;
      divergent_[1] = &fiber;
    }
  }
  if (orders_memory) release(order);
  meeting.waiting.push_back(&fiber);
  if (meeting.waiting.size() == meeting.expected && !divergent_[0]) {
    for (Fiber* waiting : meeting.waiting) {
      waiting->state = State::running;
      if (state == State::in_warp)
        ready_.push_front(waiting);
      else
        ready_.push(waiting);
    }
    meeting.waiting.clear();
    meeting.turn ^= 1;
    if (state != State::in_warp) note_progress();  // warps meet in loops that wait, too
  }
  switch_away(false);
  if (orders_memory) acquire(order);
}

void Residents::pause() {
  ready_.push(self_);
  switch_away(false);
}

void Residents::spin(Place place) {
  Fiber& fiber = *self_;
  fiber.state = State::spinning;
  fiber.place = place;
  ++idle_;
  spinning_.push(&fiber);
  switch_away(false);
  fiber.state = State::running;
}

Exchange& exchange_of(Fiber& fiber, uint32_t mask, Place place) {
  auto& exchanges = fiber.block->warps[fiber.warp];
  const uint32_t all = exchanges.rbegin()->first;
  if (mask == all) return *exchanges.rbegin()->second;
  if (!(mask >> fiber.lane & 1)) throw Error("a lane is not in the mask that it names, at ", place);
  const auto found = exchanges.find(mask);
  if (found != exchanges.end()) return *found->second;
  Unseen unseen;
  const unsigned lanes = std::min<unsigned>(32, volume(blockDim) - 32 * fiber.warp);
  if (mask > (~0u >> (32 - lanes)))
    throw Error("a mask names lanes that the warp lacks, at ", place);
  return *(exchanges[mask] = std::make_unique<Exchange>(mask));
}

bool inside(const SharedVariable& variable, const unsigned char* p, size_t bytes) {
  const unsigned char* const begin = variable.bytes.get();
  return p >= begin && p + bytes <= begin + variable.size;
}

// Whether the bytes are shared memory of a block.
bool holds(const Block& block, const unsigned char* p, size_t bytes) {
  bool found = inside(block.dynamic_shared, p, bytes);
  for (const auto& [key, variable] : block.static_shared)
    found = found || inside(variable, p, bytes);
  return found;
}

// The block's own copy of a static variable, NaN at first.
unsigned char* static_variable(Block& block, const void* key, size_t bytes) {
  const auto found = block.static_shared.find(key);
  if (found != block.static_shared.end()) return found->second.bytes.get();
  Unseen unseen;
  size_t all = block.dynamic_shared.size + bytes;
  for (const auto& [other, variable] : block.static_shared) all += variable.size;
  if (all > kSharedBytes)
    throw Error("a block has at most 227 KiB of shared memory, got ", all, " bytes");
  return (block.static_shared[key] = nan_bytes(bytes)).bytes.get();
}

void check_aligned(const void* p, size_t alignment, Place place) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
    throw Error("an address is not aligned to ", alignment, " bytes, at ", place);
}

// The block of the cluster that has the bytes in its shared memory, and has it for others.
Block& owner(const void* p, size_t bytes, Place place) {
  for (unsigned rank = 0; rank < residents->cluster_size(); ++rank) {
    Block& block = residents->of_cluster(rank);
    if (!holds(block, static_cast<const unsigned char*>(p), bytes)) continue;
    if (!block.begun || block.live == 0)
      throw Error("the shared memory of a block that has ", block.begun ? "left" : "not begun",
                  ", at ", place);
    return block;
  }
  throw Error("an address is not shared memory of the cluster, at ", place);
}

TransactionBarrier& transactions_at(Block& block, const void* barrier, Place place) {
  const auto found = block.transactions.find(barrier);
  if (found == block.transactions.end()) throw Error("no make_barrier has been here, at ", place);
  return found->second;
}

}  // namespace

void set_seed(uint64_t seed) { seed_of_runs = seed; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Together together,
              const std::function<void()>& thread) {
  const size_t blocks = volume(grid), threads = volume(block);
  if (blocks == 0 || threads == 0 || threads > kBlockThreads || shared_bytes > kSharedBytes)
    throw Error("a launch needs blocks of 1 to 1024 threads and at most 227 KiB of shared memory, ",
                "got ", blocks, " blocks of ", threads, " threads with ", shared_bytes, " bytes");
  if (together.cluster == 0 || together.cluster > kClusterBlocks || grid.x % together.cluster != 0)
    throw Error("clusters have 1 to 16 blocks, of which x has a multiple, got ", together.cluster,
                " of ", grid.x);
  const size_t resident = together.all ? blocks : together.cluster;
  if (resident * threads > kFibers)
    throw Error("at most ", kFibers, " threads can be resident here, got ", resident * threads);
  gridDim = grid;
  blockDim = block;
  struct Launch {
    Launch() { release(&launch_begins); }
    ~Launch() { acquire(&launch_ends); }
  } launch;
  for (size_t first = 0; first < blocks; first += resident)
    Residents(first, resident, shared_bytes, together, seed_of_runs, thread).run();
}

unsigned lane() { return residents->self().lane; }

void* dynamic_shared() { return residents->self().block->dynamic_shared.bytes.get(); }

void* static_shared(const void* key, size_t bytes) {
  return static_variable(*residents->self().block, key, bytes);
}

void check_shared(const void* p, size_t bytes, size_t alignment, Place place) {
  if (!holds(*residents->self().block, static_cast<const unsigned char*>(p), bytes))
    throw Error("an address is not this block's shared memory, at ", place);
  check_aligned(p, alignment, place);
}

unsigned cluster_rank() { return residents->cluster_rank(); }

unsigned cluster_size() { return residents->cluster_size(); }

unsigned char* shared_of(const void* p, unsigned rank, Place place) {
  if (rank >= residents->cluster_size())
    throw Error("a cluster of ", residents->cluster_size(), " blocks has no block ", rank, ", at ",
                place);
  const Block& own = *residents->self().block;
  Block& other = residents->of_cluster(rank);
  const auto* const first = static_cast<const unsigned char*>(p);
  if (inside(own.dynamic_shared, first, 0))
    return other.dynamic_shared.bytes.get() + (first - own.dynamic_shared.bytes.get());
  for (const auto& [key, variable] : own.static_shared)
    if (inside(variable, first, 0))
      return static_variable(other, key, variable.size) + (first - variable.bytes.get());
  throw Error("an address is not this block's shared memory, at ", place);
}

void check_shared_of_cluster(const void* p, size_t bytes, Place place) {
  owner(p, bytes, place);
  check_aligned(p, bytes, place);
}

void make_barrier(const void* barrier, unsigned arrivals, Place place) {
  check_shared(barrier, 8, 8, place);
  Unseen unseen;
  residents->self().block->transactions[barrier] = {arrivals, arrivals, 0, 0, {}, 0};
}

void expect_bytes(const void* barrier, size_t bytes, Place place) {
  TransactionBarrier& b = transactions_at(*residents->self().block, barrier, place);
  release(&b.order);
  b.bytes += static_cast<int64_t>(bytes);
  if (b.missing-- == 0) throw Error("more arrivals than a phase has, at ", place);
  b.end_phase_if_complete();
  residents->note_progress();
}

void send(const void* barrier, void* to, const void* bytes, Place place) {
  Block& block = owner(to, 16, place);
  TransactionBarrier& b = transactions_at(block, barrier, place);
  release(&b.order);
  TransactionBarrier::Store store = {static_cast<unsigned char*>(to), {}, place};
  Unseen unseen;
  std::memcpy(store.bytes, bytes, sizeof store.bytes);
  b.stores.push_back(store);
  residents->note_progress();
}

bool phase_ended(const void* barrier, unsigned parity, Place place) {
  TransactionBarrier& b = transactions_at(*residents->self().block, barrier, place);
  for (const TransactionBarrier::Store& store : b.stores) {
    // The sender's store, which is what TSan has seen: byte by byte, lest this be a memcpy.
    for (size_t i = 0; i < sizeof store.bytes; ++i)
      static_cast<volatile unsigned char*>(store.to)[i] = store.bytes[i];
    b.bytes -= sizeof store.bytes;
    residents->note_progress();
  }
  b.stores.clear();
  b.end_phase_if_complete();
  if (b.phase % 2 == parity) return false;
  acquire(&b.order);
  return true;
}

void block_barrier(Place place) {
  residents->meet(residents->self().block->barrier, State::in_block, place, true);
}

void grid_barrier(Place place) {
  if (!residents->cooperative())
    throw Error("a grid barrier outside a cooperative launch, at ", place);
  residents->meet(residents->grid_barrier(), State::in_grid, place, true);
}

void cluster_arrive(Place place) {
  Fiber& fiber = residents->self();
  if (fiber.arrived) throw Error("a second arrival at the cluster's barrier, at ", place);
  fiber.arrived = true;
  release(residents->cluster_barrier().current_order());
}

void cluster_wait(Place place) {
  Fiber& fiber = residents->self();
  if (!fiber.arrived) throw Error("a wait for the cluster without an arrival, at ", place);
  fiber.arrived = false;
  Meeting& barrier = residents->cluster_barrier();
  char* const order = barrier.current_order();
  residents->meet(barrier, State::in_cluster, place, false);
  acquire(order);
}

void warp_barrier(uint32_t mask, Place place) {
  residents->meet(exchange_of(residents->self(), mask, place), State::in_warp, place, true);
}

const unsigned char* exchange_bytes(uint32_t mask, const void* mine, size_t bytes, Place place) {
  const Fiber& fiber = residents->self();
  Exchange& exchange = exchange_of(residents->self(), mask, place);
  const unsigned turn = exchange.turn;
  unsigned char* const slot = exchange.bytes[turn][fiber.lane];
  // Byte by byte, and volatile lest the compiler make it a memcpy.
  for (size_t i = 0; i < bytes; ++i)
    static_cast<volatile unsigned char*>(slot)[i] = static_cast<const unsigned char*>(mine)[i];
  residents->meet(exchange, State::in_warp, place, false);
  return exchange.bytes[turn][0];
}

void pause() { residents->pause(); }

void spin(Place place) { residents->spin(place); }

void note_progress() { residents->note_progress(); }

AsyncCopies& async_copies() { return residents->self().copies; }

}  // namespace rnn_fused::emulation
