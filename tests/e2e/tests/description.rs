//! What is served keeps to what its description says: Schemathesis makes requests of the description, right and wrong ones, and looks at each
//! answer. `GODWIT_SEED` draws others, `GODWIT_EXAMPLES` sets how many for each operation.

use std::env;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use godwit_e2e::{ClusterSpec, schemathesis};
use godwit_model::{ImportFormat, Name};

/// Not tried: streams without an end, and what would go to addresses that are drawn.
const LEFT_OUT: [&str; 3] = ["event_watch", "vm_console", "image_fetch"];
/// What an answer must be; the others of Schemathesis's checks suppose that whatever has the right shape is accepted.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth,\
    unsupported_method";

#[test]
fn no_request_that_the_description_leads_to_gets_a_server_error_or_an_undescribed_answer() -> Result<()> {
    let cluster = ClusterSpec::new(1)?.up()?;
    // Something to be found by those requests that look for something.
    let image = Name::new("kernel")?;
    cluster.import(&image, ImportFormat::Iso, disc())?;
    let api = cluster.lab().api()?;
    let token = std::fs::read_to_string(&api.token_file).context("the administrator's token")?;
    let number = |variable: &str, default: u32| env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let mut command = Command::new(schemathesis()?);
    command.args(["run", &format!("{}/v1/openapi.json", api.url), "--tls-verify"]).arg(&api.ca_file);
    command.args(["--header", &format!("Authorization: Bearer {}", token.trim())]);
    command.args(["--checks", CHECKS, "--seed", &number("GODWIT_SEED", 1).to_string()]);
    command.args(["--max-examples", &number("GODWIT_EXAMPLES", 10).to_string(), "--request-timeout", "30"]);
    // A connection that ends between two requests is no answer.
    command.args(["--request-retries", "2"]);
    command.args(["--generation-database", "none", "--no-color", "--continue-on-failure"]);
    for operation in LEFT_OUT {
        command.args(["--exclude-operation-id", operation]);
    }
    let output = command.current_dir(env::temp_dir()).stdin(Stdio::null()).output().context("start Schemathesis")?;
    println!("{}", String::from_utf8_lossy(&output.stdout));
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "Schemathesis: {}", output.status);
    // It drew names for whatever can be created: what is left of that is no matter of this test.
    cluster.take_down()
}

fn disc() -> Vec<u8> {
    let mut content = vec![0; 64 << 10];
    content[16 * 2_048 + 1..16 * 2_048 + 6].copy_from_slice(b"CD001");
    content
}
