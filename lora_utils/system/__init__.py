"""The cellar: what is ours but not about LoRA. Files, device, signals, progress, secrets, versions.

May use: no other room.

files      write_atomically, commit_folder, read_folder, staged, sweep: whole on disk, or not at all
portable   open_descriptor, read_at, rename, replace, when_free: Linux, macOS and Windows, as one
ownership  own, own_in_turn, Ownership, InUseError: one writer to a folder, by a lock that dies with it
device     choose_precision, compute_capability: what computes; a run's dtype, not the VAE's
device_memory  free_memory, device_given_back, MemoryFullError: the card's, given back or said to be full
determinism  deterministic_algorithms: equal bytes on a GPU, for as long as a run lasts
launcher   launched_precision, launched_processes, contradictions: accelerate launch, obeyed or told
locations  looked_for, looks_like_path, why_unwritable: what a message says of a path
signals    StopRequest, interrupt_when_told_to_end: Ctrl-C and SIGTERM, heard at the end of a step
console    accept_any_text, is_terminal: what is printed never ends a run
progress   progress_bar, announce: in a terminal, a notebook, a log file
steps      Steps, finished: what is known already, and the result in the end
redaction  install, redacted, holds_token: keeps tokens out of all that is printed or logged
units      GIB: bytes, for those who need no torch
collector  collector_paused: for what makes many objects that stay, such as imports
versions   versions: of the packages that a result depends on
"""
