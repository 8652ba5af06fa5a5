// A team of threads for loops whose pieces are independent: the caller and its helpers claim pieces until none is left.
//
// Why not OpenMP: its loops end when every thread has arrived, and who waits spins. Beside other programs a thread that
// is not running then holds up all others, which spin meanwhile on the cores that it needs. Here a loop ends when its
// pieces are done, whoever did them; a helper that comes late finds none left and does no harm; and who waits longer
// than a moment sleeps. What a piece computes does not depend on who claims it.
//
// A program has one team, which makes one call after the other. Helpers are started when a call first wants them, and
// sleep between calls; a process made by fork starts its own.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#ifdef __x86_64__
#include <immintrin.h>
#endif

class Team {
   public:
    // The program's team for the length of one call from Python: others wait for their turn.
    class Call {
       public:
        explicit Call(int64_t threads) : team(*current()), turn(team.one_call) { team.gather(threads); }
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
        std::lock_guard<std::mutex> turn;
    };

   private:
    typedef void (*Run)(const void* body, int64_t first, int64_t end, int64_t thread);
    // Parts of `open`: pieces, threads, and the number of the loop.
    static constexpr uint64_t PIECES = (1 << 20) - 1, THREADS = 1023;
    static constexpr int BEFORE_THREADS = 20, BEFORE_LOOP = 30;
    static constexpr std::chrono::microseconds MOMENT{50};  // to wait for the last pieces without giving way to others
    static constexpr std::chrono::microseconds PAUSE{150};  // to wait for the next loop before going to sleep

    std::mutex one_call;  // held by whose turn it is
    int64_t threads = 1, helpers = 0;

    // The loop in progress. Who takes pieces from `open` has a part in the loop that it numbers, which then cannot end
    // before that part is done: the other fields are read only after that, and are those of that loop.
    alignas(64) std::atomic<uint64_t> open{0};  // the loop's number, its threads, its pieces that nobody has claimed
    alignas(64) std::atomic<int64_t> undone{0};  // pieces that are not done
    alignas(64) int64_t pieces = 0;
    const void* body = nullptr;
    Run run = nullptr;

    std::mutex bed;  // of those who sleep
    std::condition_variable more, done;
    std::atomic<int> sleepers{0};
    std::atomic<bool> caller_sleeps{false};

    // Never freed: helpers use it until the process ends. Shared by all libraries that include this file (a function
    // that is inline and not static is one for the program).
    static Team*& current() {
        static Team* team = made();
        return team;
    }
    static Team* made() {
        pthread_atfork(nullptr, nullptr, [] { current() = new Team; });  // the child has no helpers, and perhaps a lock
        return new Team;
    }

    void gather(int64_t count) {
        count = std::min(count, (int64_t)THREADS);
        while (helpers + 1 < count && start(helpers + 1)) helpers++;
        threads = std::max<int64_t>(1, std::min(count, helpers + 1));
    }

    // A helper: it hears no signals, which are for the program's own threads. False where the system allows no more.
    bool start(int64_t thread) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            std::thread([this, thread] { help(thread); }).detach();
        } catch (const std::system_error&) {
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    template <class Body> void share(int64_t count, const Body& todo) {
        pieces = count, body = &todo;
        run = [](const void* body, int64_t first, int64_t end, int64_t thread) {
            (*(const Body*)body)(first, end, thread);
        };
        undone.store(count, std::memory_order_relaxed);
        const uint64_t number = (open.load(std::memory_order_relaxed) >> BEFORE_LOOP) + 1;
        open.store(number << BEFORE_LOOP | (uint64_t)threads << BEFORE_THREADS | (uint64_t)count);
        if (sleepers.load()) {
            { std::lock_guard<std::mutex> lock(bed); }  // who is about to sleep has looked at `open` before, or sleeps now
            more.notify_all();
        }
        work(0);
        const auto over = [&] { return undone.load() == 0; };
        if (spin(over, MOMENT)) return;
        std::unique_lock<std::mutex> lock(bed);
        caller_sleeps.store(true);
        done.wait(lock, over);
        caller_sleeps.store(false);
    }

    // Claims pieces and does them, until none is left: fewer at a time towards the end, so that all end at about once.
    void work(int64_t thread) {
        uint64_t seen = open.load();
        while (calls(seen, thread)) {
            const int64_t left = seen & PIECES, share = std::max<int64_t>(1, left / (2 * threads_of(seen)));
            if (!open.compare_exchange_weak(seen, seen - share)) continue;
            run(body, pieces - left, pieces - left + share, thread);
            if (undone.fetch_sub(share) == share && caller_sleeps.load()) {
                { std::lock_guard<std::mutex> lock(bed); }
                done.notify_one();
            }
            seen = open.load();
        }
    }

    static int64_t threads_of(uint64_t loop) { return loop >> BEFORE_THREADS & THREADS; }
    static bool calls(uint64_t loop, int64_t thread) { return (loop & PIECES) && thread < threads_of(loop); }

    void help(int64_t thread) {
        const auto called = [&] { return calls(open.load(), thread); };
        for (;;) {
            if (!spin(called, PAUSE)) {
                std::unique_lock<std::mutex> lock(bed);
                sleepers++;
                more.wait(lock, called);
                sleepers--;
            }
            work(thread);
        }
    }

    // Waits for something, for at most so long: then, or after a moment, other threads have the core sooner than this
    // one; whether it has come.
    template <class Condition> static bool spin(const Condition& has_come, std::chrono::microseconds patience) {
        const auto start = std::chrono::steady_clock::now();
        for (std::chrono::steady_clock::duration waited{}; waited < patience;
             waited = std::chrono::steady_clock::now() - start) {
            for (int i = 0; i < 32; i++) {
                if (has_come()) return true;
#ifdef __x86_64__
                _mm_pause();
#endif
            }
            if (waited > MOMENT) sched_yield();
        }
        return false;
    }
};
