/* SPDX-License-Identifier: MIT */
/* flashkda info: what this machine and this build can do. */
#include "command.h"
#include "device_json.h"
#include "failure.h"
#include "machine.h"
#include "tensor.h"

#include <flash_kda.h>
#include <jansson.h>
#include <stdio.h>

static const char documentation[] = "Prints the version, the CPU and the levels that the CPU backend can run "
                                    "on it, the backends, the devices and the threads.\v"
                                    "The environment variable FLASH_KDA_CPU forces a level:\n"
                                    "  FLASH_KDA_CPU=generic flashkda info";

static const flash_kda_backend backends[] = {FLASH_KDA_BACKEND_REFERENCE, FLASH_KDA_BACKEND_CPU,
                                             FLASH_KDA_BACKEND_CUDA};
enum { BACKENDS = sizeof backends / sizeof backends[0] };

static const struct argp_option argp_options[] = {{"json", 'j', NULL, 0, "Print one JSON object", 0}, {0}};

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    bool *json = state->input;
    switch (key) {
    case 'j':
        *json = true;
        return 0;
    case ARGP_KEY_ARG:
        return argument_error(state, "unexpected argument '%s'", argument);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* What a call with bf16 tensors of K = V = 128 runs on; describing it touches none of their memory. */
static bool describe_prefill(int device, char *text, size_t size) {
    enum { TENSORS = 6, DIM = 128 };
    static const int64_t shape[] = {1, 1, 1, DIM};
    static uint16_t memory[TENSORS][DIM];
    struct tensor tensors[TENSORS];
    for (int i = 0; i < TENSORS; i++) {
        tensor_wrap(&tensors[i], TYPE_BF16, i == 4 ? 3 : 4, shape, memory[i]);
        tensors[i].dl.device = (DLDevice){kDLCUDA, device};
    }
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = &tensors[0].dl;
    args.k = &tensors[1].dl;
    args.v = &tensors[2].dl;
    args.g = &tensors[3].dl;
    args.beta = &tensors[4].dl;
    args.out = &tensors[5].dl;
    return flash_kda_prefill_describe(&args, text, size) == FLASH_KDA_OK;
}

/* Lines of the devices that CUDA has, or why it has none. */
static void print_devices(void) {
    char text[256];
    struct device device;
    printf("devices    cpu\n");
    for (int i = 0; device_describe(&device, i); i++) {
        printf("           cuda:%d %s, compute capability %d.%d, %d multiprocessors, %.1f GiB; driver for CUDA "
               "%d.%d, runtime %d.%d\n",
               i, device.name, device.major, device.minor, device.multiprocessors,
               (double)device.memory_bytes * 0x1p-30, device.driver_cuda / 1000, device.driver_cuda % 1000 / 10,
               device.runtime_cuda / 1000, device.runtime_cuda % 1000 / 10);
        if (describe_prefill(i, text, sizeof text))
            printf("           cuda:%d in bf16, K = V = 128: %s\n", i, text);
    }
    if (!flash_kda_backend_available(FLASH_KDA_BACKEND_CUDA))
        printf("           no cuda: %s\n", failure());
}

/* Appends to names "cuda:0" and so on. */
static json_t *cuda_devices_json(json_t *names) {
    char text[256];
    struct device device;
    json_t *devices = json_array();
    for (int i = 0; device_describe(&device, i); i++) {
        json_t *object = device_json(&device);
        if (describe_prefill(i, text, sizeof text))
            json_object_set_new(object, "prefill", json_string(text));
        json_array_append_new(devices, object);
        json_array_append_new(names, json_sprintf("cuda:%d", i));
    }
    return devices;
}

static void print_text(const struct machine *machine, const char *level) {
    printf("version    %s\n", flash_kda_version());
    printf("cpu        %s, %s, %d processors\n", machine->cpu, machine->architecture, machine->processors);
    printf("features   %s\n", machine->features);
    printf("levels    ");
    for (const char *const *name = flash_kda_cpu_levels(); *name; name++)
        printf(" %s", *name);
    printf("; chosen: %s\n", level);
    printf("threads    %d\n", machine->threads);
    printf("backends  ");
    for (int i = 0; i < BACKENDS; i++) {
        printf("%s %s%s", i ? "," : "", flash_kda_backend_name(backends[i]),
               flash_kda_backend_available(backends[i]) ? "" : " (not available)");
    }
    printf("\n");
    print_devices();
}

static bool print_json(const struct machine *machine, const char *level) {
    json_t *levels = json_array(), *available = json_object(), *devices = json_pack("[s]", "cpu");
    for (const char *const *name = flash_kda_cpu_levels(); *name; name++)
        json_array_append_new(levels, json_string(*name));
    for (int i = 0; i < BACKENDS; i++) {
        json_object_set_new(available, flash_kda_backend_name(backends[i]),
                            json_boolean(flash_kda_backend_available(backends[i])));
    }
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:o, s:s, s:o, s:o, s:o}", "version", flash_kda_version(),
                  "cpu", machine->cpu, "architecture", machine->architecture, "features", machine->features,
                  "processors", machine->processors, "threads", machine->threads, "levels", levels, "level",
                  level, "backends", available, "cuda_devices", cuda_devices_json(devices), "devices", devices);
    if (!root)
        return false;
    json_dumpf(root, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(root);
    return true;
}

int command_info(int argc, char **argv) {
    static const struct argp argp = {.options = argp_options, .parser = parse_option, .doc = documentation};
    bool json = false;
    if (!parse_arguments(&argp, argc, argv, 0, &json))
        return STATUS_ERROR;
    const char *level = flash_kda_cpu_level();
    if (!level)
        return report_error(argv[0], "%s", flash_kda_last_error());
    struct machine machine;
    machine_describe(&machine);
    if (!json)
        print_text(&machine, level);
    else if (!print_json(&machine, level))
        return report_error(argv[0], "out of memory");
    return STATUS_OK;
}
