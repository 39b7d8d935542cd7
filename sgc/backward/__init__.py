"""What hooks do while backward goes on."""
