// Run by test_team.py.
#include "team.h"
#include <cstdio>
#include <thread>
#include <vector>
// Loops of many sizes, from several callers at once: each piece is done once, and never by two threads of one number.
static int stress(int callers, int loops) {
    std::atomic<int> wrong{0};
    std::vector<std::thread> all;
    for (int caller = 0; caller < callers; caller++)
        all.emplace_back([&, caller] {
            std::vector<int> times;
            for (int i = 0; i < loops; i++) {
                const int64_t count = (i * 37 + caller) % 301, threads = (i % 50 ? (i + caller) % 6 : 40), grain = 1 + i % 3;
                times.assign(count, 0);
                Team::Call team(threads);
                if (team.threads() > std::max<int64_t>(1, threads)) wrong++;
                std::vector<int> own(team.threads());
                for (int again = 0; again < 3; again++)
                    team.loop(count, [&](int64_t j, int64_t thread) {
                        times[j]++, own[thread]++;
                        if (i % 200 == 7 && j == count / 2)  // the others wait so long that they sleep
                            std::this_thread::sleep_for(std::chrono::milliseconds(1));
                    }, grain);
                int64_t sum = 0;
                for (int n : own) sum += n;
                if (sum != 3 * count) wrong++;
                for (int n : times)
                    if (n != 3) wrong++;
                if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::microseconds(500));
            }
        });
    for (std::thread& one : all) one.join();
    return wrong;
}
int main() { return stress(3, 3000) ? 1 : 0; }
