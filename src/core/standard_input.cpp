#include "hla/core/standard_input.h"

#include <poll.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"

namespace hla {

std::string read_standard_input() {
  // read(2) goes on after a signal, and one may come just before poll(2), so neither waits long.
  constexpr int kMilliseconds = 200;
  if (::isatty(STDIN_FILENO) == 1)
    log_info("reading from the terminal; Ctrl-D on a new line ends it");
  std::string text;
  std::array<char, 1 << 16> buffer;
  for (;;) {
    throw_if_interrupted();
    pollfd input = {.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
    const int ready = ::poll(&input, 1, kMilliseconds);
    if (ready == 0 || (ready < 0 && errno == EINTR)) continue;
    const ssize_t got = ready < 0 ? -1 : ::read(STDIN_FILENO, buffer.data(), buffer.size());
    if (got == 0) return text;
    if (got > 0) {
      text.append(buffer.data(), static_cast<size_t>(got));
    } else if (errno != EINTR && errno != EAGAIN) {
      throw_runtime(std::string("cannot read stdin: ") + std::strerror(errno));
    }
  }
}

}  // namespace hla
