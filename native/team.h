// A team of threads for loops whose pieces are independent: the caller and its helpers claim pieces until none is left.
//
// Why not OpenMP: its loops end when every thread has arrived, and who waits spins. Beside other programs a thread that
// is not running then holds up all others, which spin meanwhile on the cores that it needs. Here a loop ends when its
// pieces are done, whoever did them; a helper that comes late finds none left and does no harm; and who waits longer
// than a moment sleeps. What a piece computes does not depend on who claims it.
//
// A program has one team, which makes one call after the other. Helpers are started when a call first wants them, and
// sleep between calls; a process made by fork starts its own. With pthreads: what the C++ library has of them needs a
// newer one than some Pythons bring.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef TEAM
#define TEAM unnamed_team
#endif
inline namespace TEAM {  // named after this text by build.py: libraries share a team only if they agree what it looks like

class Team {
   public:
    // The program's team for the length of one call from Python: others wait for their turn.
    class Call {
       public:
        explicit Call(int64_t threads) : team(current()) {
            pthread_mutex_lock(&team.one_call);
            team.gather(threads);
        }
        ~Call() { pthread_mutex_unlock(&team.one_call); }
        Call(const Call&) = delete;

        int64_t threads() const { return team.threads; }

        // body(i, thread) for each i < count, in any order; thread < threads() tells apart those that run at once.
        // At least `grain` neighbours are done together by one thread: for what takes less time than to share it.
        template <class Body> void loop(int64_t count, const Body& body, int64_t grain = 1) {
            grain = std::max(grain, count / (int64_t)PIECES + 1);
            const int64_t pieces = (count + grain - 1) / grain;
            if (pieces <= 1 || team.threads == 1) {
                for (int64_t i = 0; i < count; i++) body(i, 0);
                return;
            }
            team.share(pieces, [&](int64_t first, int64_t end, int64_t thread) {
                for (int64_t i = first * grain; i < std::min(end * grain, count); i++) body(i, thread);
            });
        }

       private:
        Team& team;
    };

   private:
    typedef void (*Run)(const void* body, int64_t first, int64_t end, int64_t thread);
    // Parts of `open`: pieces, threads, and the number of the loop.
    static constexpr uint64_t PIECES = (1 << 20) - 1, THREADS = 1023;
    static constexpr int BEFORE_THREADS = 20, BEFORE_LOOP = 30;
    static constexpr std::chrono::microseconds MOMENT{50};  // to wait for the last pieces without giving way to others
    static constexpr std::chrono::microseconds PAUSE{150};  // to wait for the next loop before going to sleep

    struct alignas(64) Helper {
        Team* team;
        int64_t thread;
        std::atomic<bool> asleep{false};
        pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    };

    pthread_mutex_t one_call = PTHREAD_MUTEX_INITIALIZER;  // held by whose turn it is
    int64_t threads = 1;
    std::vector<std::unique_ptr<Helper>> helpers;  // number i is thread i + 1

    // The loop in progress. Who takes pieces from `open` has a part in the loop that it numbers, which then cannot end
    // before that part is done: the other fields are read only after that, and are those of that loop.
    alignas(64) std::atomic<uint64_t> open{0};  // the loop's number, its threads, its pieces that nobody has claimed
    alignas(64) std::atomic<int64_t> undone{0};  // pieces that are not done
    alignas(64) int64_t pieces = 0;
    const void* body = nullptr;
    Run run = nullptr;

    alignas(64) pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;  // of those who sleep
    pthread_cond_t done = PTHREAD_COND_INITIALIZER;
    std::atomic<int> sleepers{0};
    std::atomic<bool> caller_sleeps{false};

    // Never freed: helpers use it until the process ends. Shared by the libraries that include this file where a
    // function that is inline is one for the program (g++ on Linux); elsewhere each has its own.
    static std::atomic<Team*>& place() {
        static std::atomic<Team*> team{nullptr};
        return team;
    }
    static Team& current() {
        static const int registered = pthread_atfork(nullptr, nullptr, [] { place() = nullptr; });  // no helpers there
        (void)registered;
        if (!place()) {
            Team *none = nullptr, *made = new Team;
            if (!place().compare_exchange_strong(none, made)) delete made;  // somebody else was first
        }
        return *place();
    }

    void gather(int64_t count) {
        count = std::min(count, (int64_t)THREADS);
        while ((int64_t)helpers.size() + 1 < count && start()) continue;
        threads = std::max<int64_t>(1, std::min(count, (int64_t)helpers.size() + 1));
    }

    // One more helper. It hears no signals but of its own faults: the others are for the program's threads. False where
    // the system allows no more.
    bool start() {
        helpers.push_back(std::make_unique<Helper>());
        helpers.back()->team = this;
        helpers.back()->thread = (int64_t)helpers.size();
        sigset_t most, before;
        sigfillset(&most);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&most, fault);
        pthread_sigmask(SIG_SETMASK, &most, &before);
        pthread_attr_t how;
        pthread_attr_init(&how);
        pthread_attr_setdetachstate(&how, PTHREAD_CREATE_DETACHED);
        unbind(&how);
        pthread_t made;
        const bool started = !pthread_create(&made, &how, begin, helpers.back().get());
        pthread_attr_destroy(&how);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (!started) helpers.pop_back();
        return started;
    }

    static void* begin(void* helper) {
        ((Helper*)helper)->team->help(*(Helper*)helper);
        return nullptr;
    }

    // OpenMP, asked to bind threads to cores, has bound the one that starts helpers: they are not for that core alone.
    static void unbind(pthread_attr_t* how) {
#ifdef __linux__
        cpu_set_t every;
        CPU_ZERO(&every);
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) CPU_SET(cpu, &every);
        for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"})
            if (std::getenv(name)) pthread_attr_setaffinity_np(how, sizeof every, &every);  // those that are ours count
#endif
    }

    template <class Body> void share(int64_t count, const Body& todo) noexcept {
        const int64_t wanted = std::min(threads, count);
        pieces = count, body = &todo;
        run = [](const void* body, int64_t first, int64_t end, int64_t thread) {
            (*(const Body*)body)(first, end, thread);
        };
        undone.store(count, std::memory_order_relaxed);
        const uint64_t number = (open.load(std::memory_order_relaxed) >> BEFORE_LOOP) + 1;
        open.store(number << BEFORE_LOOP | (uint64_t)wanted << BEFORE_THREADS | (uint64_t)count);
        for (int64_t i = 0; sleepers.load() && i < wanted - 1; i++)
            if (helpers[i]->asleep.load()) rouse(*helpers[i]);
        work(0);
        const auto over = [&] { return undone.load() == 0; };
        if (spin(over, MOMENT)) return;
        pthread_mutex_lock(&bed);
        caller_sleeps.store(true);
        while (!over()) pthread_cond_wait(&done, &bed);
        caller_sleeps.store(false);
        pthread_mutex_unlock(&bed);
    }

    // Claims pieces and does them, until none is left: fewer at a time towards the end, so that all end at about once.
    void work(int64_t thread) noexcept {
        uint64_t seen = open.load();
        while (calls(seen, thread)) {
            const int64_t left = seen & PIECES, share = std::max<int64_t>(1, left / (3 * threads_of(seen)));
            if (!open.compare_exchange_weak(seen, seen - share)) continue;
            run(body, pieces - left, pieces - left + share, thread);
            if (undone.fetch_sub(share) == share && caller_sleeps.load()) {
                pthread_mutex_lock(&bed);
                pthread_cond_signal(&done);
                pthread_mutex_unlock(&bed);
            }
            seen = open.load();
        }
    }

    static int64_t threads_of(uint64_t loop) { return loop >> BEFORE_THREADS & THREADS; }
    static bool calls(uint64_t loop, int64_t thread) { return (loop & PIECES) && thread < threads_of(loop); }

    void help(Helper& me) {
        const auto called = [&] { return calls(open.load(), me.thread); };
        for (;;) {
            if (spin(called, PAUSE)) work(me.thread);
            else sleep(me, called);
        }
    }

    // Sleeps until it is roused, unless it is called now: either the caller sees it asleep, or it sees the new loop.
    template <class Condition> void sleep(Helper& me, const Condition& called) {
        pthread_mutex_lock(&bed);
        me.asleep.store(true);
        sleepers++;
        while (me.asleep.load() && !called()) pthread_cond_wait(&me.wake, &bed);
        if (me.asleep.exchange(false)) sleepers--;
        pthread_mutex_unlock(&bed);
    }

    void rouse(Helper& one) {
        pthread_mutex_lock(&bed);
        if (one.asleep.exchange(false)) {
            sleepers--;
            pthread_cond_signal(&one.wake);
        }
        pthread_mutex_unlock(&bed);
    }

    // Waits for something, for at most so long: then, or after a moment, other threads have the core sooner than this
    // one; whether it has come.
    template <class Condition> static bool spin(const Condition& has_come, std::chrono::microseconds patience) {
        const auto start = std::chrono::steady_clock::now();
        for (std::chrono::steady_clock::duration waited{}; waited < patience;
             waited = std::chrono::steady_clock::now() - start) {
            for (int i = 0; i < 32; i++) {
                if (has_come()) return true;
#if defined(__x86_64__)
                _mm_pause();
#elif defined(__aarch64__)
                asm volatile("isb");
#endif
            }
            if (waited > MOMENT) sched_yield();
        }
        return false;
    }
};

}  // namespace TEAM
