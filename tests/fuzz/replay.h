/* SPDX-License-Identifier: Apache-2.0 */
/* A harness without libFuzzer: one input a line, in hexadecimal, on stdin. */
#ifndef REPLAY_H
#define REPLAY_H

int main(void)
{
	static char line[8192];
	static uint8_t input[sizeof(line) / 2];
	unsigned count = 0;

	while (fgets(line, sizeof(line), stdin)) {
		size_t n = 0;

		for (const char *p = line; sscanf(p, "%2hhx", &input[n]) == 1; p += 2)
			n++;
		LLVMFuzzerTestOneInput(input, n);
		count++;
	}
	printf("%u\n", count);
	return 0;
}

#endif
