"""How many instructions an artifact takes on AArch64, counted in an emulator."""
