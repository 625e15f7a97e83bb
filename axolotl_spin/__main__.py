from axolotl_spin.cli import spin

if __name__ == "__main__":
    spin(prog_name="python -m axolotl_spin")
