// Runs a ThreadPool hard: steps of random size, one to eight threads from step to step, threads that are put aside, two
// callers at once, step numbers that wrap, a system that gives no threads. Prints one line and returns 1 where an item
// was not computed exactly once and after all of the operation before it, or a thread takes no part any more.
//
// What items touch are plain variables, so that under ThreadSanitizer every order that the pool promises is checked.
//
//   thread_pool_check NUM_STEPS SEED

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <random>

#include "thread_pool.h"

namespace {

constexpr int MAX_THREADS = 8, MAX_OPS = 12, MAX_ITEMS = 24;

[[noreturn]] void fail(const char* what, int operation, int item, int thread) {
    printf("operation %d, item %d, thread %d: %s\n", operation, item, thread, what);
    fflush(stdout);
    _exit(1);
}

// What a step is checked against; plain memory that the pool has to order.
struct Board {
    ThreadPool& pool;
    uint64_t step = 0;
    uint64_t computed[MAX_OPS][MAX_ITEMS] = {};
    int num_items[MAX_OPS] = {}, num_threads = 0;
    struct alignas(64) Own {
        uint64_t num_taken = 0;
        std::atomic<bool> is_busy{false};
    } own[MAX_THREADS];

    // One step, with pauses that put threads aside.
    void run(std::mt19937& random) {
        const int num_ops = random() % (MAX_OPS + 1), threads = 1 + random() % MAX_THREADS, style = random() % 4;
        int items[MAX_OPS];
        uint32_t pauses[MAX_OPS];
        for (int n = 0; n < num_ops; n++) {
            items[n] = style == 0 ? random() % 2 : style == 1 ? random() % 4 : random() % (MAX_ITEMS + 1);
            pauses[n] = random() % 64 == 0 ? random() % MAX_ITEMS : MAX_ITEMS;
        }
        pool.run(
            num_ops, threads,
            [&] {
                step++;
                num_threads = threads;
                for (int n = 0; n < num_ops; n++) num_items[n] = items[n];
            },
            [&](int n) { return items[n]; },
            [&](int n, int item, int thread) {
                if (thread >= num_threads) fail("the step has no such thread", n, item, thread);
                if (own[thread].is_busy.exchange(true)) fail("two threads have this number", n, item, thread);
                own[thread].num_taken++;
                for (int before = 0; n && before < num_items[n - 1]; before++)
                    if (computed[n - 1][before] != step) fail("the operation before is not done", n, item, thread);
                if (item == int(pauses[n])) usleep(300);
                if (computed[n][item] == step) fail("computed twice", n, item, thread);
                computed[n][item] = step;
                own[thread].is_busy = false;
            });
        // (Under two callers the other's step may be running by now; these are this caller's own.)
    }

    // All items of the last step of this board; for one caller only.
    void check_done() const {
        for (int n = 0; n < MAX_OPS; n++)
            for (int item = 0; item < num_items[n]; item++)
                if (computed[n][item] != step && num_items[n]) fail("not computed", n, item, 0);
    }
    void forget() { memset(num_items, 0, sizeof num_items); }
};

// Every thread can still be had: items that wait until each of them has one.
void check_all_take_part(ThreadPool& pool) {
    std::atomic<int> num_here{0};
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    pool.run(
        1, MAX_THREADS, [] {}, [](int) { return MAX_THREADS; },
        [&](int n, int item, int thread) {
            num_here++;
            while (num_here < MAX_THREADS) {
                if (std::chrono::steady_clock::now() > end) fail("a thread takes no part any more", n, item, thread);
                usleep(50);
            }
        });
}

void check_one_caller(ThreadPool& pool, int num_steps, std::mt19937& random) {
    auto board = std::make_unique<Board>(pool);
    for (int n = 0; n < num_steps; n++) {
        board->forget();
        board->run(random);
        board->check_done();
        if (n % 64 == 0) usleep(random() % 2 * 1000);  // long enough that the others sleep
        if (n % 128 == 0) check_all_take_part(pool);
    }
    check_all_take_part(pool);
}

void check_two_callers(ThreadPool& pool, int num_steps, unsigned seed) {
    auto board = std::make_unique<Board>(pool);
    auto call = [&](unsigned own_seed) {
        std::mt19937 random(own_seed);
        for (int n = 0; n < num_steps; n++) board->run(random);
    };
    std::thread other(call, seed + 1);
    call(seed + 2);
    other.join();
    if (board->step != 2 * uint64_t(num_steps)) fail("a step was lost", 0, 0, 0);
}

}  // namespace

#ifndef __SANITIZE_THREAD__
static std::atomic<bool> has_threads{true};

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* arg) {
    static const auto real = (decltype(&pthread_create))dlsym(RTLD_NEXT, "pthread_create");
    return has_threads ? real(thread, attributes, start, arg) : EAGAIN;
}

static void check_no_threads(int num_steps, std::mt19937& random) {
    ThreadPool& pool = *new ThreadPool;
    has_threads = false;
    auto board = std::make_unique<Board>(pool);
    for (int n = 0; n < num_steps; n++) {
        board->forget();
        board->run(random);
        board->check_done();
    }
    has_threads = true;
    check_all_take_part(pool);
}
#endif

int main(int, char** argv) {
    const int num_steps = atoi(argv[1]), seed = atoi(argv[2]);
    std::mt19937 random(seed);
    // Never destroyed, as in the library: their threads sleep in them.
    check_one_caller(*new ThreadPool, num_steps, random);
    check_two_callers(*new ThreadPool, num_steps / 2, seed);
    check_one_caller(*new ThreadPool(uint32_t(-num_steps / 8)), num_steps / 4, random);
#ifndef __SANITIZE_THREAD__
    check_no_threads(50, random);
#endif
    printf("right\n");
    return 0;
}
