/* low-ports PROGRAM ARGUMENTS...: runs the program, which may then listen on ports below 1024
 * without being root.
 *
 * For container runtimes that keep those ports for root (containerd before 2.0, CRI-O; Docker does
 * not). This file has cap_net_bind_service in its *permitted* set alone, so the kernel runs it also
 * where the container has no such capability to give (with an effective bit it would refuse), and
 * then nothing is passed on. What is there becomes ambient, which is what a program without file
 * capabilities inherits; no other capability is touched.
 *
 * Sources: capabilities(7), "Ambient" and "Safety checking for capability-dumb binaries"; prctl(2),
 * PR_CAP_AMBIENT. */
#include <errno.h>
#include <linux/capability.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
    const unsigned int wanted = 1u << CAP_NET_BIND_SERVICE;

    if (argc < 2) {
        fprintf(stderr, "usage: low-ports PROGRAM ARGUMENTS...\n");
        return 2;
    }
    if (syscall(SYS_capget, &header, sets) == 0 && (sets[0].permitted & wanted) != 0) {
        sets[0].inheritable |= wanted;
        /* Where this is refused, the program runs as without it, and says itself which port it
         * could not have. */
        if (syscall(SYS_capset, &header, sets) == 0)
            (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0);
    }
    execvp(argv[1], argv + 1);
    fprintf(stderr, "low-ports: %s: %s\n", argv[1], strerror(errno));
    return 127;
}
