// Runs an entry point on several threads; shared by the CPU kernels.
#pragma once
#include <pthread.h>

#include <cstdint>
#include <cstdlib>

namespace mpformer {

using Entry = void (*)(void*);
struct Start {
  Entry entry;
  void* work;
};

inline void* start(void* argument) {
  const Start& s = *static_cast<Start*>(argument);
  s.entry(s.work);
  return nullptr;
}

// Runs on `threads` threads, the caller among them; every entry takes all tasks that nobody else takes, so
// fewer threads than asked for are no error. Torch's own pool (`launcher`: GOMP_parallel) is used where it can
// be: its threads spin for a while after an operator of torch and would compete with any of ours. Otherwise
// threads live for one call, which leaves nothing behind to spin, to survive a fork or to be torn down.
inline void run_on_threads(Entry entry, void* work, int threads, void* launcher) {
  if (threads > 1 && launcher) {
    using Launcher = void (*)(Entry, void*, unsigned, unsigned);
    reinterpret_cast<Launcher>(launcher)(entry, work, unsigned(threads), 0);
    return;
  }
  Start s{entry, work};
  pthread_t* others =
      threads > 1 ? static_cast<pthread_t*>(std::malloc(sizeof(pthread_t) * (threads - 1))) : nullptr;
  int started = 0;
  if (others)
    while (started < threads - 1 && pthread_create(&others[started], nullptr, start, &s) == 0) started++;
  entry(work);
  for (int i = 0; i < started; i++) pthread_join(others[i], nullptr);
  std::free(others);
}

}  // namespace mpformer
