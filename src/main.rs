fn main() {
    drava::cli::main()
}
