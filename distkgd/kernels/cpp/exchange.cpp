// Messages between the processes of one machine: for every ordered pair of ranks a ring of bytes in memory they share.
//
// A message is a header and its bytes, in the order in which both sides have begun their messages; one larger than the
// ring streams through it. Whoever waits moves bytes of all messages in both directions, so that nobody waits in a
// circle. Each ring has one writer and one reader: they share two counters that only grow, stored with release and read
// with acquire. A rank without anything to do spins, then yields, then sleeps on its bell (a futex).
//
// One thread at a time may use a post. Linux only.

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

namespace {

constexpr int CHANNELS = 2;
constexpr uint64_t CHUNK = 1 << 17;            // moved between two looks at the other rings
constexpr int64_t YIELD_NANOSECONDS = 200'000;  // then a rank sleeps; waking one takes about a quarter of it
constexpr int64_t SLEEP_NANOSECONDS = 20'000'000;  // between two looks whether the others live

// Each on cache lines of its own, also where lines are fetched in pairs or have 128 bytes.
struct alignas(128) Counter {
    std::atomic<uint64_t> value;
};
struct alignas(128) Bell {
    std::atomic<uint32_t> rung;
    std::atomic<uint32_t> asleep;
};
struct Ring {
    Counter written, read;  // bytes since the beginning
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

struct Header {
    uint64_t number, bytes;  // of the message: which of its channel, how long
};

struct Message {
    Header header;
    char* body;
    int64_t ticket;
    uint64_t done;  // bytes moved, header first

    uint64_t left() const { return sizeof header + header.bytes - done; }
};

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000ll + time.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One direction between this rank and another, seen from this rank.
struct Lane {
    Ring* ring;
    char* data;
    std::deque<Message> queue;
    uint64_t moved = 0, other = 0;  // this side's counter, and what was last seen of the other side's
};

class Post {
  public:
    Post(char* memory, uint64_t size, int rank, int world, uint64_t capacity, int64_t spin, const int32_t* processes)
        : memory(memory), size(size), rank(rank), world(world), capacity(capacity), spin(spin) {
        bells = reinterpret_cast<Bell*>(memory);
        auto rings = reinterpret_cast<Ring*>(bells + world);
        char* data = memory + header_size(world);
        for (int channel = 0; channel < CHANNELS; ++channel)
            for (int peer = 0; peer < world; ++peer) {
                uint64_t out = (channel * world + rank) * world + peer, in = (channel * world + peer) * world + rank;
                outgoing.push_back({rings + out, data + out * capacity, {}});
                incoming.push_back({rings + in, data + in * capacity, {}});
            }
        for (int peer = 0; peer < world; ++peer)
            lives.push_back({peer == rank ? -1 : processes[peer], POLLIN, 0});  // a negative one is not looked at
    }

    ~Post() { munmap(memory, size); }

    static uint64_t header_size(uint64_t world) {
        uint64_t bytes = world * sizeof(Bell) + CHANNELS * world * world * sizeof(Ring);
        return (bytes + 4095) / 4096 * 4096;
    }

    int64_t begin(int channel, const uint64_t* send, const uint64_t* send_bytes, const uint64_t* receive,
                  const uint64_t* receive_bytes) {
        int64_t ticket = begun++;
        int count = 0;
        uint64_t number = numbers[channel]++;
        auto add = [&](Lane& lane, uint64_t address, uint64_t bytes) {
            if (bytes == 0) return;
            lane.queue.push_back({{number, bytes}, reinterpret_cast<char*>(address), ticket, 0});
            ++count;
        };
        for (int peer = 0; peer < world; ++peer) {
            if (peer == rank) continue;
            add(outgoing[channel * world + peer], send[peer], send_bytes[peer]);
            add(incoming[channel * world + peer], receive[peer], receive_bytes[peer]);
        }
        if (count) unfinished[ticket] = count;
        while (advance()) {}
        if (send_bytes[rank])
            memcpy(reinterpret_cast<char*>(receive[rank]), reinterpret_cast<char*>(send[rank]), send_bytes[rank]);
        return ticket;
    }

    // 0: done; 1: not yet, after so long; 2 + peer: that one's process has ended; -1 - peer: it sent something else.
    int wait(int64_t ticket, int64_t nanoseconds) {
        int64_t start = now(), quiet = start;
        while (true) {
            bool moved = advance();
            if (stranger >= 0) return -1 - stranger;
            if (!unfinished.count(ticket)) return 0;
            int64_t time = now();
            if (moved) {
                quiet = time;
            } else if (time - quiet < spin) {
                for (int i = 0; i < 32; ++i) pause_briefly();
            } else if (time - quiet < spin + YIELD_NANOSECONDS) {
                sched_yield();
            } else if (sleep()) {
                quiet = now();
            } else {
                // What a rank wrote before its end still counts, so look at the rings once more.
                int gone = dead();
                while (gone >= 0 && advance()) {}
                if (gone >= 0 && unfinished.count(ticket)) return 2 + gone;
            }
            if (time - start > nanoseconds && unfinished.count(ticket)) return 1;
        }
    }

  private:
    // Moves what can be moved now, a chunk per lane; whether anything was.
    bool advance() {
        if (stranger >= 0) return false;  // that lane's next bytes belong nowhere
        bool any = false;
        for (int channel = 0; channel < CHANNELS; ++channel)
            for (int step = 1; step < world; ++step) {
                int to = (rank + step) % world, from = (rank + world - step) % world;
                any |= move<true>(outgoing[channel * world + to], to);
                any |= move<false>(incoming[channel * world + from], from);
            }
        return any;
    }

    template <bool OUT>
    bool move(Lane& lane, int peer) {
        if (lane.queue.empty()) return false;
        auto& mine = OUT ? lane.ring->written.value : lane.ring->read.value;
        auto& theirs = OUT ? lane.ring->read.value : lane.ring->written.value;
        auto available = [&] { return OUT ? capacity - (lane.moved - lane.other) : lane.other - lane.moved; };
        uint64_t before = lane.moved;
        while (!lane.queue.empty() && lane.moved - before < CHUNK) {
            if (available() == 0) lane.other = theirs.load(std::memory_order_acquire);
            if (available() == 0) break;
            Message& message = lane.queue.front();
            Header expected = message.header;
            bool body = message.done >= sizeof(Header);
            char* at = body ? message.body + (message.done - sizeof(Header))
                            : reinterpret_cast<char*>(&message.header) + message.done;
            uint64_t place = lane.moved & (capacity - 1);
            uint64_t bytes = std::min({available(), capacity - place, CHUNK,
                                       body ? message.left() : sizeof(Header) - message.done});
            if (OUT)
                memcpy(lane.data + place, at, bytes);
            else
                memcpy(at, lane.data + place, bytes);
            lane.moved += bytes;
            message.done += bytes;
            if (!OUT && !body && memcmp(&expected, &message.header, message.done) != 0) {
                stranger = peer;
                return false;
            }
            if (message.left() == 0) finish(lane);
        }
        if (lane.moved == before) return false;
        mine.store(lane.moved, std::memory_order_release);
        wake(bells[peer]);
        return true;
    }

    void finish(Lane& lane) {
        auto found = unfinished.find(lane.queue.front().ticket);
        if (--found->second == 0) unfinished.erase(found);
        lane.queue.pop_front();
    }

    // The fences here and in sleep() are a pair: either the sleeper sees the counter, or the waker sees the sleeper.
    void wake(Bell& bell) {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!bell.asleep.load(std::memory_order_relaxed)) return;
        bell.rung.fetch_add(1, std::memory_order_release);
        syscall(SYS_futex, &bell.rung, FUTEX_WAKE, 1, nullptr, nullptr, 0);
    }

    // Whether the bell rang or bytes could be moved before the time was over.
    bool sleep() {
        Bell& bell = bells[rank];
        uint32_t seen = bell.rung.load(std::memory_order_acquire);
        bell.asleep.store(1, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        bool moved = advance();
        timespec time{0, SLEEP_NANOSECONDS};
        // Also true after a signal or a bell that rang before: then there is just another round.
        bool woken = moved || syscall(SYS_futex, &bell.rung, FUTEX_WAIT, seen, &time, nullptr, 0) == 0;
        bell.asleep.store(0, std::memory_order_relaxed);
        return woken;
    }

    // A process that has ended, also while nobody has collected its exit code; or -1.
    int dead() {
        if (poll(lives.data(), lives.size(), 0) <= 0) return -1;
        for (int peer = 0; peer < world; ++peer)
            if (lives[peer].revents) return peer;
        return -1;
    }

    char* memory;
    uint64_t size;
    int rank, world;
    uint64_t capacity;
    int64_t spin;
    Bell* bells;
    std::vector<Lane> outgoing, incoming;  // [channel][peer]
    std::vector<pollfd> lives;
    std::unordered_map<int64_t, int> unfinished;  // ticket -> messages of it that are on their way
    uint64_t numbers[CHANNELS] = {};
    int64_t begun = 0;
    int stranger = -1;
};

}  // namespace

extern "C" {

// Bytes of the memory that `world` ranks share, with rings of `capacity` bytes (a power of two).
uint64_t exchange_size(int32_t world, uint64_t capacity) {
    return Post::header_size(world) + CHANNELS * static_cast<uint64_t>(world) * world * capacity;
}

// A rank's post in the zeroed file `descriptor`, or null. processes: [world] pidfds. spin: nanoseconds before yielding.
void* exchange_open(int32_t descriptor, int32_t rank, int32_t world, uint64_t capacity, int64_t spin,
                    const int32_t* processes) {
    uint64_t size = exchange_size(world, capacity);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) return nullptr;
    return new Post(static_cast<char*>(memory), size, rank, world, capacity, spin, processes);
}

void exchange_close(void* post) { delete static_cast<Post*>(post); }

// send, receive: [world] addresses; the memory must stay until exchange_wait has returned 0 for the returned ticket.
int64_t exchange_begin(void* post, int32_t channel, const uint64_t* send, const uint64_t* send_bytes,
                       const uint64_t* receive, const uint64_t* receive_bytes) {
    return static_cast<Post*>(post)->begin(channel, send, send_bytes, receive, receive_bytes);
}

int32_t exchange_wait(void* post, int64_t ticket, int64_t nanoseconds) {
    return static_cast<Post*>(post)->wait(ticket, nanoseconds);
}
}
