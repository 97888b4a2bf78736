/* SPDX-License-Identifier: MIT */
/* Runs what may hang, die or print in a child process. */
#include "child.h"

#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECONDS = 30, FAILED = 9 };

static void run_child(int output, bool (*works)(void *context), void *context) {
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    alarm(SECONDS);
    _exit(works(context) ? 0 : FAILED);
}

const char *child_run(bool (*works)(void *context), void *context) {
    static char text[300];
    FILE *output = tmpfile();
    if (!output)
        return "no temporary file";
    fflush(NULL);
    pid_t child = fork();
    if (child == 0)
        run_child(fileno(output), works, context);
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child)
        snprintf(text, sizeof text, "no child");
    else if (WIFSIGNALED(status))
        snprintf(text, sizeof text, "signal %d in the child", WTERMSIG(status));
    else if (WEXITSTATUS(status))
        snprintf(text, sizeof text, "the child ended with status %d", WEXITSTATUS(status));
    else
        text[0] = '\0';
    char printed[200];
    rewind(output);
    size_t length = fread(printed, 1, sizeof printed - 1, output);
    printed[length] = '\0';
    fclose(output);
    if (length && !text[0])
        snprintf(text, sizeof text, "the child printed: %s", printed);
    return text[0] ? text : NULL;
}
