"""What Linux itself refuses a process from now on, whatever runs in it: writing outside a folder
(Landlock), and other processes, connections, mounts (seccomp). `guard.py` runs it by its path, so
it imports the standard library only.

Both are one-way, need no rights, and are inherited. Where the kernel or the machine's architecture
has one of them not, the other is put up.
"""

import ctypes
import errno
import os
import platform
import struct

NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2  # of prctl(2)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = (
    444,
    445,
    446,
)  # Landlock's calls, of the same number everywhere
ALLOW, DENY, ABSENT = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
CLONE_THREAD = 0x10000
NONE = 1 << 20  # no call has that number
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, AUDIT_ARCH
# numbers of system calls on x86_64 and aarch64; NONE where the machine has it not
CALLS = {
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, NONE), "vfork": (58, NONE), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "prlimit64": (302, 261), "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "setsid": (112, 157), "setpgid": (109, 154),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "io_uring_setup": (425, 425),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "reboot": (169, 142),
    "swapon": (167, 224),
}  # fmt: skip


def put_up(folder: str) -> None:
    """Puts up what there is of both.

    Args:
        folder: where files may still be written.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        keep_inside(libc, folder)
        refuse_calls(libc, platform.machine())


def keep_inside(libc: ctypes.CDLL, folder: str) -> None:
    """Landlock: files are made, written, renamed and removed beneath `folder` only, and none is
    executed."""
    abi = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    execute, write_file, remove, make = 1 << 0, 1 << 1, 0b11 << 4, 0b1111111 << 6
    refer, truncate = (1 << 13 if abi >= 2 else 0), (1 << 14 if abi >= 3 else 0)
    allowed = write_file | remove | make | refer | truncate
    fields = [allowed | execute]
    if abi >= 4:
        fields.append(0b11)  # TCP: bind, connect
    if abi >= 6:
        fields.append(0b11)  # abstract sockets and signals: to processes behind the same wall only
    ruleset = struct.pack(f"={len(fields)}Q", *fields)
    rules = libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    if rules < 0:
        return
    inside = os.open(folder, os.O_RDONLY)
    added = libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, inside), 0)
    if added == 0:
        libc.syscall(RESTRICT_SELF, rules, 0)
    os.close(inside)
    os.close(rules)


def refuse_calls(libc: ctypes.CDLL, machine: str) -> None:
    """seccomp: the system calls of CALLS fail; but threads are still made, and signals sent to
    oneself."""
    if machine not in MACHINES or struct.calcsize("P") != 8:
        return
    column, arch = MACHINES[machine]
    code = filter_code(column, arch, os.getpid())
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    libc.prctl(SET_SECCOMP, FILTER, header, 0, 0)


def filter_code(column: int, arch: int, pid: int) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions (code, jump if true, jump if false, operand)."""
    number, architecture, first_argument = (
        0,
        4,
        16,
    )  # offsets in seccomp_data; both machines are little-endian
    load, equal, at_least, any_bit, back = 0x20, 0x15, 0x35, 0x45, 0x06
    code = [
        (load, 0, 0, architecture),
        (equal, 1, 0, arch),
        (back, 0, 0, DENY),
        (load, 0, 0, number),
    ]
    code += [(at_least, 0, 1, 1 << 30), (back, 0, 0, DENY)]  # x86_64's second table of calls
    wanted = {"clone": (any_bit, CLONE_THREAD), "kill": (equal, pid), "tgkill": (equal, pid), "prlimit64": (equal, 0),
              "sched_setaffinity": (equal, 0)}  # fmt: skip
    for name, numbers in CALLS.items():
        code.append((equal, 0, 4 if name in wanted else 1, numbers[column]))
        if name in wanted:
            test, operand = wanted[name]
            code += [(load, 0, 0, first_argument), (test, 0, 1, operand), (back, 0, 0, ALLOW)]
        code.append(
            (back, 0, 0, ABSENT if name == "clone3" else DENY)
        )  # then libc takes clone, whose flags can be read
    return [*code, (back, 0, 0, ALLOW)]
