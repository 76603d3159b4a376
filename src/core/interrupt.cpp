#include "hla/core/interrupt.h"

#include <csignal>
#include <ctime>

#include "hla/core/error.h"

namespace hla {
namespace {

volatile std::sig_atomic_t g_signal = 0;
volatile std::sig_atomic_t g_first_seconds = 0;

// Seconds of a monotonic clock, from inside a signal handler.
std::sig_atomic_t now_seconds() {
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::sig_atomic_t>(now.tv_sec);
}

void on_signal(int signal) {
  if (g_signal != 0) {
    // timeout(1) and others signal the process and then its group: that is one request, not two.
    if (now_seconds() - g_first_seconds < 2) return;
    // The user insists: die of the signal itself, so that the shell sees the true cause.
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  g_first_seconds = now_seconds();
  g_signal = signal;
}

}  // namespace

void install_interrupt_handlers() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

int interrupt_signal() { return g_signal; }

void throw_if_interrupted() {
  if (g_signal == SIGINT) throw Error(ExitCode::kInterrupted, "interrupted");
  if (g_signal == SIGTERM) throw Error(ExitCode::kTerminated, "terminated");
}

}  // namespace hla
