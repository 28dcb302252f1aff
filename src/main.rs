fn main() -> std::process::ExitCode {
    drava::cli::main()
}
