// Decode kernels for CPUs: a program of fused operations, whose items are claimed by a team of threads (see team.h).
//
// Row invariance is built in. Every output element is one accumulation over the contraction axis in ascending order, in
// one lane of a vector (see matmul.h). Attention walks keys in ascending blocks of 16 absolute positions. Nothing is
// split over threads along a reduction, so the bits depend neither on the number of threads nor on who computes what.
// Sums over a row are made in 16 lanes and then by halves, on every instruction set alike: all give the same bits.
//
// Left out: activations in anything but float32, and head or hidden sizes that are not multiples of 16; the Python side
// refuses those by name.
//
// Layouts of weights: weights.h. Keys are [slot, kv head, block of 16 positions, qk head dim, 16]; values
// [slot, kv head, position, v head dim]. Both are rings of whole blocks: absolute block b lies at b % num_blocks.

#include <unistd.h>

#include <vector>

#include "attention.h"
#include "dense.h"
#include "experts.h"
#include "head.h"
#include "team.h"

namespace {

struct Operation {
    int (*num_items)(const Op&, const Rows&, int num_threads);
    void (*run)(const Item&);
};

// By `Op::kind`; runtime/program.py has the same order.
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
    Team team;
    std::vector<Worker> workers;
    pid_t pid = getpid();
};

// A child of a fork has none of its parent's threads. Never destroyed: threads may sleep in it when the process ends.
Process& process() {
    static Process* one = new Process;
    if (one->pid != getpid()) one = new Process;
    return *one;
}

}  // namespace

extern "C" {

// What the caller must agree with before it passes a pointer.
int speedstack_layout() { return int(sizeof(Op) * 1000 + sizeof(Rows)); }

// Vector lanes that the kernels are made for: of the layouts of weights.h, 16 takes words and others take bytes.
int speedstack_lanes() { return W; }

// 0, or one more than the number of the operation whose kind is unknown; -1: more operations than a program may have.
int speedstack_run(const Op* ops, int num_ops, const Rows* rows, int num_threads) {
    if (num_ops > Team::MAX_OPERATIONS) return -1;
    for (int n = 0; n < num_ops; n++)
        if (ops[n].kind < 0 || ops[n].kind >= NUM_KINDS) return n + 1;
    Process& here = process();
    here.team.run(
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
