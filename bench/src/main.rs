use drava_bench::limits::{self, LimitsConfig};
fn main() {
    let quick = std::env::args().any(|a| a == "--quick");
    let dir = std::env::current_dir().unwrap();
    let r = limits::run(&LimitsConfig::new(dir, quick), |s| eprintln!("{s}")).unwrap();
    println!("{}", serde_json::to_string_pretty(&r).unwrap());
}
