// Ctrl-C and SIGTERM as an orderly stop: handlers set a flag, long loops look at it.
#pragma once

namespace hla {

// Installs the handlers for SIGINT and SIGTERM. A second signal, a second or two after the first,
// ends the process at once.
void install_interrupt_handlers();

// The signal that arrived (SIGINT, SIGTERM), or 0.
int interrupt_signal();

// Throws Error(kInterrupted) or Error(kTerminated) when a signal has arrived. Call it between
// units of work; destructors then remove what is half-written.
void throw_if_interrupted();

}  // namespace hla
