// Threads that claim work. An operation is a number of items; a thread takes the next one by a counter, and an operation
// is done when its items are. Nobody waits for a thread that has taken nothing: one that the system has put aside holds
// up at most the item that it was computing.
//
// Counters carry the step they belong to, so that a thread that wakes late finds that its step is over and takes
// nothing. What such a thread reads on its way is the pool's own memory, never the caller's.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
inline void pause_a_little() { _mm_pause(); }
#else
// `yield` does nothing on most cores that have no second thread; this takes about as long as x86's pause.
inline void pause_a_little() { __asm__ volatile("isb" ::: "memory"); }
#endif

class ThreadPool {
  public:
    static constexpr int MAX_OPERATIONS = 1 << 14;
    // How long a thread looks for news before it sleeps: about 20 and 100 microseconds.
    static constexpr int SPINS_IN_A_STEP = 500, SPINS_BETWEEN_STEPS = 2500;

    // The number before the first step's: 32 bits that wrap, of which nothing but the difference counts.
    explicit ThreadPool(uint32_t step = 0) : published_(step), step_(step) {}

    // Calls work(operation, item, thread) for all items of operation 0, then of operation 1, and so on; this thread is
    // number 0 and does its part. `begin()` and `num_items(operation)` are called before anything runs. Where the system
    // gives no more threads those that there are do the work.
    template <class Begin, class NumItems, class Work>
    void run(int num_operations, int num_threads, const Begin& begin, const NumItems& num_items, const Work& work) {
        std::lock_guard<std::mutex> lock(mutex_);
        begin();
        start(num_threads - 1);
        const uint64_t step = ++step_;
        for (int n = 0; n < num_operations; n++) {
            // In this order: who still has the last step's tag fails on the counter before it sees the new number.
            // (Release: a full fence for each of hundreds of operations would cost as much as some of them.)
            counters_[n].next.store(step << 32, std::memory_order_release);
            counters_[n].done.store(step << 32, std::memory_order_release);
            counters_[n].num_items.store(num_items(n), std::memory_order_release);
        }
        call_ = [](const void* work, int n, int item, int thread) { (*(const Work*)work)(n, item, thread); };
        work_ = &work;
        num_operations_.store(num_operations);
        if (num_threads_.exchange(num_threads) != num_threads) num_threads_.notify_all();
        published_.store(step_);
        if (num_threads > 1 && num_asleep_.load()) published_.notify_all();
        take_part(step, 0);
    }

  private:
    struct alignas(64) Counter {
        std::atomic<uint64_t> next{0};  // step, item to take
        std::atomic<uint64_t> done{0};  // step, items that are done
        std::atomic<uint32_t> num_items{0}, num_waiting{0};
    };

    static uint64_t step_of(uint64_t counter) { return counter >> 32; }
    static uint32_t count_of(uint64_t counter) { return uint32_t(counter); }

    void start(int num_workers) {
        for (; num_workers_ < num_workers; num_workers_++) try {
                std::thread([this, thread = num_workers_ + 1] { serve(thread); }).detach();
            } catch (const std::system_error&) {
                return;
            }
    }

    void serve(int thread) {
        uint32_t seen = published_.load() - 1;
        for (;;) {
            // Those that are more than wanted sleep until that changes: they neither spin nor are woken for each step.
            for (int wanted = num_threads_.load(); thread >= wanted; wanted = num_threads_.load())
                num_threads_.wait(wanted);
            uint32_t now = published_.load();
            for (int spin = 0; now == seen && spin < SPINS_BETWEEN_STEPS; spin++) {
                pause_a_little();
                now = published_.load();
            }
            if (now == seen) {
                num_asleep_++;
                published_.wait(seen);
                num_asleep_--;
                continue;
            }
            seen = now;
            // Asked again: a step for fewer threads may have come, which has no place for this one.
            if (thread < num_threads_.load()) take_part(seen, thread);
        }
    }

    // Works until all operations are done, or until the step turns out to be over.
    void take_part(uint64_t step, int thread) {
        const int num_operations = num_operations_.load();
        for (int n = 0; n < num_operations; n++) {
            Counter& counter = counters_[n];
            if (!claim_all(counter, step, n, thread) || !wait_for(counter, step)) return;
        }
    }

    bool claim_all(Counter& counter, uint64_t step, int n, int thread) {
        for (;;) {
            uint64_t next = counter.next.load();
            if (step_of(next) != step) return false;
            // This step's if an item is got. Not to be read again after it is done: the step may be over by then.
            const uint32_t all = counter.num_items.load();
            if (count_of(next) >= all) return true;
            if (!counter.next.compare_exchange_weak(next, next + 1)) continue;
            call_(work_, n, int(count_of(next)), thread);
            const uint64_t done = counter.done.fetch_add(1) + 1;
            if (count_of(done) == all && counter.num_waiting.load()) counter.done.notify_all();
        }
    }

    bool wait_for(Counter& counter, uint64_t step) {
        const uint32_t all = counter.num_items.load();
        for (int spin = 0;; spin++) {
            const uint64_t done = counter.done.load();
            if (step_of(done) != step) return false;
            if (count_of(done) >= all) return true;
            if (spin < SPINS_IN_A_STEP) {
                pause_a_little();
                continue;
            }
            // Asleep, this thread leaves its processor to whoever holds the item.
            counter.num_waiting++;
            counter.done.wait(done);
            counter.num_waiting--;
        }
    }

    // What only `run` touches, what is written once a step, and what sleeping threads count in: a line each.
    std::mutex mutex_;
    const std::unique_ptr<Counter[]> counters_{new Counter[MAX_OPERATIONS]};
    int num_workers_ = 0;
    alignas(64) std::atomic<uint32_t> published_;
    std::atomic<int> num_operations_{0}, num_threads_{0};
    uint32_t step_;
    void (*call_)(const void*, int, int, int) = nullptr;
    const void* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> num_asleep_{0};
};
