// Decode kernels for CPUs: a program of fused operations, run by a pool of threads (see thread_pool.h).
//
// Row invariance: every output element is one accumulation over the contraction axis in ascending order, in one vector
// lane (see matmul.h). Attention walks ascending blocks of 16 absolute positions. Threads never split a reduction, so
// bits do not depend on the threads. Sums over a row use 16 lanes, then halves, on every instruction set: all give the
// same bits.
//
// Left out: activations other than float32, and head or hidden sizes that are not multiples of 16; the Python side
// refuses those by name.
//
// Weight layouts: weights.h. Keys are [slot, kv head, block of 16 positions, qk head dim, 16]; values [slot, kv head,
// position, v head dim]. Both are rings of whole blocks: absolute block b lies at b % num_blocks.

#include <pthread.h>

#include <atomic>
#include <vector>

#include "attention.h"
#include "dense.h"
#include "experts.h"
#include "head.h"
#include "pack.h"
#include "thread_pool.h"

namespace {

struct Operation {
    int (*num_items)(const Op&, const Rows&, int num_threads);
    void (*run)(const Item&);
};

// By `Op::kind`; runtime/backends/cpu/program.py has the same order.
const Operation OPERATIONS[] = {
    {embed_items, embed},
    {qkv_items, qkv},
    {attention_items, attention},
    {linear_items, linear},
    {gate_up_items, gate_up},
    {router_items, router},
    {choose_items, choose},
    {expert_gate_up_items, expert_gate_up},
    {expert_down_items, expert_down},
    {lm_head_items, lm_head},
    {argmax_items, argmax},
    {markov_items, markov},
};
constexpr int NUM_KINDS = sizeof OPERATIONS / sizeof *OPERATIONS;

struct Process {
    ThreadPool pool;
    std::vector<Worker> workers;
};

// Never destroyed: threads may sleep in it when the process ends.
std::atomic<Process*> current{nullptr};

// A forked child has none of its parent's threads, and a missing thread may still hold the lock.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { current = nullptr; });

Process& process() {
    Process* here = current.load();
    if (here) return *here;
    Process* mine = new Process;
    if (current.compare_exchange_strong(here, mine)) return *mine;
    delete mine;  // another thread was faster, and this one's has done nothing yet
    return *here;
}

}  // namespace

extern "C" {

// What the caller must agree with before it passes a pointer.
int speedstack_layout() { return int(sizeof(Op) * 1000 + sizeof(Rows)); }

// The format of MXFP4 panels that these kernels write and read.
int speedstack_mxfp4_format() { return MXFP4; }

// Bytes of sixteen outputs' weights.
int speedstack_panel_bytes(int format, int K) { return int(Panels{format, int(K), nullptr}.panel_bytes()); }

// Writes panels (see pack.h). Returns 1 if the caller's layout of `Matrices` or its format differs.
int speedstack_pack(const Matrices* matrices, int size, int num_threads) {
    const Matrices& m = *matrices;
    if (size != int(sizeof m) || m.format == OTHER_MXFP4) return 1;
    process().pool.run(
        1, num_threads, [] {}, [&](int) { return int(m.num_matrices * panels_a_matrix(m)); },
        [&](int, int panel, int) { pack_panel(m, panel); });
    return 0;
}

// Returns 0; one more than the index of an operation of unknown kind; -1: too many operations; -2: weights packed for
// another instruction set.
int speedstack_run(const Op* ops, int num_ops, const Rows* rows, int num_threads) {
    if (num_ops > ThreadPool::MAX_OPERATIONS) return -1;
    for (int n = 0; n < num_ops; n++) {
        if (ops[n].kind < 0 || ops[n].kind >= NUM_KINDS) return n + 1;
        if (format_of(ops[n]) == OTHER_MXFP4) return -2;
    }
    Process& here = process();
    here.pool.run(
        num_ops, num_threads,
        [&] {
            while (int(here.workers.size()) < num_threads) here.workers.emplace_back();
            for (int n = 0; n < num_threads; n++) here.workers[n].begin(num_threads);
        },
        [&](int n) { return OPERATIONS[ops[n].kind].num_items(ops[n], *rows, num_threads); },
        [&](int n, int item, int thread) {
            OPERATIONS[ops[n].kind].run({ops[n], n, *rows, item, here.workers[thread]});
        });
    return 0;
}
}
